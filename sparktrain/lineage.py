"""Which attempt's steps count: the chain of checkpoints, and the end of the attempt that came to one."""

from typing import NamedTuple

from sparktrain.checkpoints import Manifest
from sparktrain.errors import DataError
from sparktrain.results import RankResult
from sparktrain.rundir import RunDir


class Committed(NamedTuple):
    """Steps [first_step, last_step) are those that attempt ``generation`` took, with ``world`` ranks."""

    generation: int
    first_step: int
    last_step: int
    world: int


def committed(directory: RunDir, steps: int) -> list[Committed]:
    """The steps that count of a run of ``steps``, in order and without gaps; none before the first checkpoint.

    Raises :class:`DataError` for checkpoints that cannot follow one another, ``ModelError`` for one that is not there.
    """
    number, results = _finishing(directory)
    manifests = [directory.checkpoints.read(name) for name in directory.checkpoints.names()]
    if manifests and manifests[0].generation > number:  # it was begun anew after that
        results = []
    newest = [manifest for manifest in manifests if not results or manifest.generation == number][:1]
    name = newest[0].name if newest else results[0].resumed_from if results else None
    found: list[Committed] = []
    for checkpoint in directory.checkpoints.lineage(name):
        _check(checkpoint, found)
        found.append(Committed(checkpoint.generation, _end(found), checkpoint.step, checkpoint.world))
    if results and _end(found) < steps:
        found.append(Committed(number, _end(found), steps, results[0].world))
    return found


def _end(found: list[Committed]) -> int:
    return found[-1].last_step if found else 0


def _check(checkpoint: Manifest, before: list[Committed]) -> None:
    generation = before[-1].generation if before else 1
    if checkpoint.step < _end(before) or checkpoint.generation < generation:
        raise DataError(
            f"checkpoint {checkpoint.name} cannot follow one of step {_end(before)} and attempt {generation}: its "
            "manifest was changed; restore it"
        )


def _finishing(directory: RunDir) -> tuple[int, list[RankResult]]:
    """The newest attempt all of whose ranks came to the end, and what they handed back."""
    for number in range(directory.latest_generation(), 0, -1):
        outcomes = directory.outcomes(number)
        results = [outcome for outcome in outcomes if isinstance(outcome, RankResult)]
        if results and len(results) == len(outcomes) == results[0].world:
            return number, results
    return 0, []
