"""Changes of settings while a run goes on: which may be made, from which step on each counts, and the record of both.

::

    changes/20261121T131512.123456-3f2a91c0.json   anyone   {"kind": "hot", "values": {"optimizer.lr": 0.0001}}
    changes/taken.json                             rank 0   what was taken, in order, with the step: the run's history

A setting is of one kind, by what a change of it needs: ``hot``, the next step reads it; ``warm``, the optimizer is set
anew; ``cold``, ranks start again from a checkpoint. All others are what makes it this run and no other.

What was taken counts from its step on for every later attempt too, so a run that is interrupted after a change ends as
one that was not.
"""

import datetime
import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sparktrain import atomic
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError

Kind = Literal["hot", "warm", "cold"]

# The first that a setting's name begins with.
_KINDS: tuple[tuple[str, Kind], ...] = (
    ("optimizer.lr", "hot"),
    ("schedule", "hot"),
    ("train.max_grad_norm", "hot"),
    ("train.left_out", "hot"),
    ("run.log_every", "hot"),
    ("checkpoint.every", "hot"),
    ("eval.every", "hot"),
    ("optimizer", "warm"),
    ("strategy.compression_decay", "warm"),
    ("strategy.outer_lr", "warm"),
    ("strategy.outer_momentum", "warm"),
    ("strategy.error_decay", "warm"),
    ("train.micro_batch", "cold"),
    ("train.autocast", "cold"),
    ("train.accumulate_fp32", "cold"),
    ("model.attention", "cold"),
    ("model.gradient_checkpointing", "cold"),
)
# Read by every start; not part of what a run is, so a start may be given others.
_OF_A_START = (
    *("launch", "checkpoint", "eval", "data.mirrors", "data.cache_dir", "data.cache_bytes"),
    *("train.on_nonfinite", "train.max_skipped", "run.trackers", "inner_loop.timeout"),
)


@dataclass(frozen=True)
class Change:
    """New values by setting; ``step``: the first that they count for, once they were taken."""

    name: str
    kind: Kind
    values: dict[str, Any]
    step: int | None = None


class Changes:
    """Those of the run directory ``run_dir``. Making the object touches nothing."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self.path = run_dir, run_dir / "changes"

    def ask(self, kind: Kind, before: RunConfig, after: RunConfig, step: int | None = None) -> Change:
        """Leave a change from ``before`` to ``after`` for the run to take, from its next step on or, where it is to go
        back for it, from ``step`` on. Raises :class:`ConfigError` where nothing
        differs, or what differs is of another kind, or the run is finished."""
        if (self._run_dir / "result.json").exists():
            raise ConfigError(f"{self._run_dir} holds a finished run: nothing in it can change")
        old, new = dict(_leaves(before.model_dump(mode="json"))), dict(_leaves(after.model_dump(mode="json")))
        values = {key: new[key] for key in new if old.get(key) != new[key]}
        if not values:
            raise ConfigError("nothing changes: give a setting with another value, such as --optimizer.lr 1e-4")
        needed = max((_kind_of(key) for key in values), key=get_args(Kind).index)
        if needed != kind:
            key = next(key for key in values if _kind_of(key) == needed)
            raise ConfigError(f"{key} is {needed}, the change was said to be {kind}: say --kind {needed}")
        at = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
        change = Change(f"{at}-{uuid.uuid4().hex[:8]}", kind, values, step)
        self.path.mkdir(exist_ok=True)
        said = {"kind": kind, "values": values} | ({} if step is None else {"step": step})
        atomic.write_json(self.path / f"{change.name}.json", said)
        return change

    def asked(self) -> list[str]:
        """Names of all changes, oldest first."""
        return sorted(file.stem for file in self.path.glob("[0-9]*.json"))

    def read(self, name: str) -> Change:
        """Raises :class:`ConfigError` for what is no change."""
        file = self.path / f"{name}.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return Change(name, found["kind"], dict(found["values"]), found.get("step"))
        except (OSError, ValueError, TypeError, KeyError):
            raise ConfigError(f"{file} is no change of settings: remove it and use jobs/change.py") from None

    def taken(self) -> list[Change]:
        """What was taken, in that order. Raises :class:`ConfigError` where that cannot be read."""
        file = self.path / "taken.json"
        try:
            return [Change(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError):
            raise ConfigError(f"{file} is damaged, and says from which step on changes count: restore it") from None

    def take(self, step: int) -> list[Change]:
        """Take all that wait, from ``step`` on; after those that were taken before, also where an attempt that died
        took them for a later step. All that were ever taken."""
        changes = self.all()
        first = max([step, *(change.step for change in changes if change.step is not None)])
        taken = [replace(change, step=first) if change.step is None else change for change in changes]
        if taken != self.taken():
            atomic.write_json(self.path / "taken.json", [asdict(change) for change in taken])
        return taken

    def all(self) -> list[Change]:
        """What was taken, then what waits."""
        taken = self.taken()
        known = {change.name for change in taken}
        return [*taken, *(self.read(name) for name in self.asked() if name not in known)]

    def describe(self) -> list[str]:
        """A line for each, for people."""
        lines = []
        for change in self.all():
            since = "the next step" if change.step is None else f"step {change.step + 1}"
            lines += [f"changed    {key} is {value} from {since} on" for key, value in change.values.items()]
        return lines


def changed(config: RunConfig, changes: Iterable[Change]) -> RunConfig:
    """``config`` with ``changes`` made, in that order."""
    values = config.model_dump(mode="json")
    for change in changes:
        for key, value in change.values.items():
            *sections, name = key.split(".")
            section = values
            for part in sections:
                section = section[part]
            section[name] = value
    return RunConfig.model_validate(values)


def _kind_of(key: str) -> Kind:
    for name, kind in _KINDS:
        if f"{key}.".startswith(f"{name}."):
            return kind
    if key.startswith(_OF_A_START):
        raise ConfigError(
            f"{key} is read when a run starts: touch STOP in its directory and start it again with --{key}"
        )
    raise ConfigError(
        f"{key} cannot change, it is part of what this run is: start another one, with model.from_pretrained to go on "
        "from this one's model"
    )


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
