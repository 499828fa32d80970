"""What a rank hands back, in a pickled output file: ``RankResult`` or ``RankFailure``.

The driver reads it with an unpickler that admits these classes and nothing else, so a planted pickle is refused, not
run.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

from sparktrain.errors import LaunchError
from sparktrain.results.records import StepRecord
from sparktrain.results.shares import SourceRecord


@dataclass(frozen=True)
class RankResult:
    """What a rank that finished hands back.

    Args:
        digest: sha256 of all its parameters at the end.
        heldout_before: held-out loss in nats per token at the start, the same on all ranks; None where not asked for.
        records: the steps of this attempt.
        first_step_at: seconds since the epoch when its first step ended, on this rank's clock.
        resumed_from: the checkpoint that the attempt began from; None: from the first step.
    """

    rank: int
    world: int
    host: str
    records: list[StepRecord]
    digest: str
    num_parameters: int
    heldout_before: float | None
    heldout_after: float | None
    first_step_at: float
    resumed_from: str | None = None


@dataclass(frozen=True)
class RankFailure:
    """What a rank that raised leaves behind. ``echo``: it only noticed that another rank was gone."""

    rank: int
    host: str
    kind: str
    message: str
    traceback: str
    exit_code: int
    echo: bool


Outcome = RankResult | RankFailure

_ADMITTED = {(cls.__module__, cls.__qualname__): cls for cls in (StepRecord, SourceRecord, RankResult, RankFailure)}


class _OutcomeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no result type")
        return _ADMITTED[module, name]


def dump_outcome(outcome: Outcome) -> bytes:
    """The bytes of an output file."""
    return pickle.dumps(outcome, protocol=4)


def load_outcome(data: bytes, name: str) -> Outcome:
    """Inverse of :func:`dump_outcome`; raises :class:`LaunchError` naming the file for anything but our types."""
    try:
        outcome = _OutcomeUnpickler(io.BytesIO(data)).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as error:
        raise LaunchError(f"output file {name} was refused: {error}; nothing of it was run: remove it") from None
    if not isinstance(outcome, RankResult | RankFailure):
        raise LaunchError(f"output file {name} was refused: it holds a {type(outcome).__name__}, not a rank's result")
    return outcome
