"""Is a run directory what it says: its plan, its checkpoints, its history. Reads everything, changes nothing."""

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.dataset as pads
from pydantic import Field

from sparktrain import receipts
from sparktrain.checkpoints import Manifest, sha256_of
from sparktrain.config import Section
from sparktrain.config.place import Place
from sparktrain.errors import DataError, ModelError, SparktrainError
from sparktrain.plan import Assignment, PlanSpec, rows
from sparktrain.results import read_records
from sparktrain.rundir import RunDir
from sparktrain.storage import dataset

_ROWS = 1 << 16


class Verify(Section):
    """Check a run directory: the plan against its seed, checkpoints against their manifests, steps against both."""

    run_dir: Place = Field()
    """Run directory."""


def verify(settings: Verify) -> Iterator[str]:
    """A line for each thing that was checked. Raises :class:`DataError` at the end where any was wrong."""
    directory, wrong = RunDir(settings.run_dir), 0
    directory.config()
    for check in _CHECKS:
        try:
            yield f"ok     {check(directory)}"
        except SparktrainError as error:
            wrong += 1
            yield f"WRONG  {error}"
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:  # of a file that is torn
            wrong += 1
            yield f"WRONG  {check.__name__[1:]}: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if wrong:
        raise DataError(
            f"{settings.run_dir}: {wrong} of {len(_CHECKS)} checks found something wrong, see the lines above"
        )


def _plan(directory: RunDir) -> str:
    """Every row of the plan is the one that its seed gives, once."""
    spec = directory.plan_spec()
    if spec is None:
        raise DataError("plan: there is none, or plan.json cannot be read")
    found = pads.dataset(**dataset(directory.plan), format="parquet", exclude_invalid_files=False)
    count, position = found.count_rows(), 0
    if count != spec.num_positions:
        raise DataError(f"plan: {count:,} rows, expected {spec.num_positions:,}")
    while position < spec.num_positions:
        end = min(position + _ROWS, spec.num_positions)
        _compare(spec, found, position, end)
        position = end
    return f"plan: {count:,} rows, each the one that its seed gives"


def _compare(spec: PlanSpec, found: pads.Dataset, begin: int, end: int) -> None:
    place = pads.field("pos")
    table = found.to_table(columns=list(Assignment._fields), filter=(place >= begin) & (place < end)).sort_by("pos")
    there = [Assignment(**row) for row in table.to_pylist()]
    for row, expected in zip(there, rows(spec, begin, end), strict=False):
        if row != expected:
            raise DataError(f"plan: row {row}, expected {expected}")


def _checkpoints(directory: RunDir) -> str:
    """Every checkpoint that is kept is whole."""
    whole, spec = 0, directory.plan_spec()
    for name in directory.checkpoints.names():
        manifest = directory.checkpoints.read(name)
        directory.checkpoints.check_own(manifest)
        if spec and manifest.step > spec.steps:
            raise ModelError(f"checkpoint {name} is of step {manifest.step}, the plan ends at step {spec.steps}")
        if damage := directory.checkpoints.damage(manifest):
            raise ModelError(f"checkpoint {name}: {damage}")
        whole += 1
    return f"checkpoints: {whole}, all whole"


def _history(directory: RunDir) -> str:
    """Along the chain of checkpoints, every rank of its time took every step once."""
    chain, done = _chain(directory), 0
    for checkpoint in chain:
        expected = range(done, checkpoint.step)
        for rank in range(checkpoint.world):
            file = directory.records(checkpoint.generation, rank, checkpoint.step)
            if not file.exists():
                raise DataError(f"history: {file} is missing")
            taken = Counter(record.step for _, record in read_records(file.read_bytes()))
            if taken != Counter(expected):
                raise DataError(
                    f"history: rank {rank} of attempt {checkpoint.generation} took other steps than {done} to "
                    f"{checkpoint.step - 1} before checkpoint {checkpoint.name}"
                )
        done = checkpoint.step
    attempts = len({checkpoint.generation for checkpoint in chain})
    return f"history: {done:,} steps in {len(chain)} checkpoints of {attempts} attempts, each taken once"


def _receipts(directory: RunDir) -> str:
    """Every rank has receipts for the targets that it recorded, in files that are as they were committed."""
    chain, targets = _chain(directory), Counter[tuple[int, int, int]]()
    parts = {path: part for checkpoint in chain for path, part in checkpoint.parts.items()}
    for number in sorted({checkpoint.generation for checkpoint in chain}):
        for file in sorted(directory.generation(number).glob("receipts-*.parquet")):
            part = parts.get(str(file.relative_to(directory.path)))
            if part and sha256_of(file) != part.sha256:
                raise DataError(f"receipts: {file} has another content than was written: restore it from a copy")
            sums = receipts.read(file).group_by(["rank", "step"]).aggregate([("targets", "sum")])
            for row in sums.to_pylist():
                targets[number, row["rank"], row["step"]] += row["targets_sum"]
    for checkpoint in chain:
        for rank in range(checkpoint.world):
            file = directory.records(checkpoint.generation, rank, checkpoint.step)
            for _, record in read_records(file.read_bytes()):
                if (said := targets[checkpoint.generation, rank, record.step]) != record.tokens:
                    raise DataError(
                        f"receipts: rank {rank} of attempt {checkpoint.generation} recorded {record.tokens} targets in "
                        f"step {record.step}, its receipts say {said}: jobs/plan.py --audit tells more"
                    )
    return f"receipts: of {len(targets):,} steps of ranks, for every target; jobs/plan.py --audit compares them all"


def _chain(directory: RunDir) -> list[Manifest]:
    names = directory.checkpoints.names()
    return directory.checkpoints.lineage(names[0] if names else None)


def _result(directory: RunDir) -> str:
    """The ranks of the last attempt agree, and their steps follow on from the checkpoint they began at."""
    spec, result = directory.plan_spec(), directory.finished()
    if result is None or spec is None:
        return "result: the run is not finished"
    steps = result.table["step"].to_pylist()
    if steps != list(range(spec.steps)):
        raise DataError(f"result: {len(steps)} steps of {spec.steps}, or not each once")
    return f"result: {len(steps):,} steps, {len(result.ranks)} ranks, parameters {result.digest[:16]}"


_CHECKS = (_plan, _checkpoints, _history, _receipts, _result)
