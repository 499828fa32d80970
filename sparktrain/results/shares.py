"""What each source of a mixture has given: sequences, tokens, epochs, loss; beside what was asked of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

_COUNTS = ("sequences", "tokens")
# Of a step's records in a table.
TYPE = pa.list_(
    pa.struct({"name": pa.string(), "sequences": pa.int64(), "tokens": pa.int64(), "loss_sum": pa.float64()})
)


class SourceRecord(NamedTuple):
    """One source in one step of one rank; the loss is a sum in nats over ``tokens``, its targets."""

    name: str
    sequences: int
    tokens: int
    loss_sum: float


class Asked(NamedTuple):
    """A source, its part of all sequences, and the sequences of one of its epochs."""

    name: str
    part: float
    epoch: int


def columns(records: Iterable[SourceRecord]) -> dict[str, float]:
    """Of one step on all ranks, for each source: ``loss_NAME`` in nats per target token, NaN where there was none;
    ``tokens_NAME``; ``sequences_NAME``."""
    found: dict[str, float] = {}
    for name, one in _summed(records).items():
        loss = one.loss_sum / one.tokens if one.tokens else math.nan
        found |= {f"loss_{name}": loss, f"tokens_{name}": one.tokens, f"sequences_{name}": one.sequences}
    return found


def types(records: Iterable[SourceRecord]) -> list[tuple[str, pa.DataType]]:
    """Those of the :func:`columns` of steps in which these sources are mixed."""
    kinds = {"loss": pa.float64(), "tokens": pa.int64(), "sequences": pa.int64()}
    return [(f"{what}_{name}", kind) for name in _summed(records) for what, kind in kinds.items()]


def given(asked: Sequence[Asked], sequences: Sequence[int], tokens: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What so many ``sequences`` and ``tokens`` of each source are of all, and of what was asked."""
    all_sequences, all_tokens = max(1, sum(sequences)), max(1, sum(tokens))
    return {
        name: {
            "asked": part,
            "part": n / all_sequences,
            "sequences": n,
            "tokens": t,
            "part_of_tokens": t / all_tokens,
            "epochs": n / epoch,
        }
        for (name, part, epoch), n, t in zip(asked, sequences, tokens, strict=True)
    }


def totals(asked: Sequence[Asked], steps: pa.Table) -> dict[str, dict[str, Any]]:
    """:func:`given` of a whole run, from the table with the :func:`columns` of its steps, and the losses of the first
    and the last step that had a target of the source, or None. Nothing where steps do not say it: a program of the
    user's own took them."""
    if not all(f"loss_{one.name}" in steps.column_names for one in asked):
        return {}
    column = {name: steps[name].to_pylist() for name in steps.column_names if asked}
    found = given(asked, *([sum(column[f"{what}_{one.name}"]) for one in asked] for what in _COUNTS))
    for name, values in found.items():
        losses = [loss for loss in column[f"loss_{name}"] if not math.isnan(loss)]
        values |= {"loss_first": losses[0] if losses else None, "loss_last": losses[-1] if losses else None}
    return found


def lines(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """:func:`given` or :func:`totals` for people, a line for each source."""
    width = max((len(name) for name in sources), default=0)
    return [
        f"{name:<{width}}  {one['part']:.2%} of sequences, {one['asked']:.2%} asked: {one['sequences']:,} sequences, "
        f"{one['tokens']:,} tokens, {one['epochs']:.2f} epochs"
        + (f", loss {one['loss_first']:.4f} -> {one['loss_last']:.4f}" if one.get("loss_last") is not None else "")
        for name, one in sources.items()
    ]


def to_row(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a step's record as a table has them: no ``sources`` where there are none."""
    sources = values.pop("sources")
    return values | ({"sources": [source._asdict() for source in sources]} if sources else {})


def from_row(row: dict[str, Any]) -> dict[str, Any]:
    """Inverse of :func:`to_row`."""
    return row | {"sources": tuple(SourceRecord(**source) for source in row.get("sources", ()))}


def _summed(records: Iterable[SourceRecord]) -> dict[str, SourceRecord]:
    found: dict[str, SourceRecord] = {}
    for one in records:
        was = found.get(one.name, SourceRecord(one.name, 0, 0, 0.0))
        found[one.name] = SourceRecord(
            one.name, was.sequences + one.sequences, was.tokens + one.tokens, was.loss_sum + one.loss_sum
        )
    return found
