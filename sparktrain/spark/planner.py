"""The plan as Spark DataFrames: write it, and view it by rank.

It is written by a map-only job from position to microshard: each task computes a range of positions as ``plan`` does,
in NumPy, and writes them as they are, in step order: nothing is shuffled or sorted, and no row passes through Spark.
The same numbers in SQL (``ordering.py``) are what the audit compares with.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from sparktrain import storage
from sparktrain.config import RunConfig, Skip
from sparktrain.errors import ConfigError, DataError, LaunchError
from sparktrain.plan import PlanSpec, Source, files, psyche, skip, slots_of, stride_of
from sparktrain.plan.mixture import normalised
from sparktrain.rundir import RunDir
from sparktrain.spark import stored
from sparktrain.spark.context import parallelism
from sparktrain.spark.ordering import microshards
from sparktrain.tokens import Shard

# Each is a term of an SQL expression.
_MOST_JUMPS = 100
# Each has keys of its own, which the driver makes.
_MOST_EPOCHS = 10_000
# Of the plan that one task writes, as one file of at most 65 MB: a task costs as much as a million rows.
_LEAST_ROWS, _MOST_ROWS = 1 << 16, 1 << 23


def spec_of(config: RunConfig, *sources: Sequence[Shard]) -> PlanSpec:
    """The plan that ``config`` asks for of the shards of each source, in the order of ``config.data.trained_on``.

    Raises where what is to be skipped is not there, or is all of a source.
    """
    data, of_source = config.data, list(config.data.trained_on) or [f"data.pipeline {config.data.pipeline}"]
    spec = PlanSpec(
        shards=tuple(chain.from_iterable(sources)),
        sequence_length=data.sequence_length,
        total_batch=config.train.total_batch,
        steps=config.train.steps,
        seed=config.run.seed,
        window=data.window,
        order=data.order,
        block=data.block,
        psyche_seed=(data.psyche_seed or psyche.seed_bytes(config.run.seed).hex()) if data.order == "psyche" else "",
        ramp=config.train.batch_ramp,
    )
    if len(sources) > 1:
        named = zip(data.mixed, sources, strict=True)
        spec = replace(spec, sources=tuple(Source(s.name, len(shards), s.weight or 0.0) for s, shards in named))
    spec = replace(spec, skipped=skip.merge(_sequences(spec, entry, of_source) for entry in data.skip if entry.shard))
    for setting, order in zip(of_source, spec.orders, strict=True):
        if order.kept == 0:
            raise DataError(f"data.skip names all {order.n} sequences of {setting}: leave some to train on")
    spec = replace(spec, sources=_weighed(spec))
    for entry in data.skip:
        if entry.steps:
            first, last = (spec.first_position(step) for step in entry.steps)
            ends = skip.places_of(spec.skipped_places, np.array([first, last - 1]))
            place = (int(ends[0]), int(ends[1]) + 1)
            spec = replace(spec, skipped_places=skip.merge([*spec.skipped_places, place]))
    if len(spec.skipped_places) > _MOST_JUMPS:
        raise ConfigError(f"data.skip passes over more than {_MOST_JUMPS} ranges of steps: join some of them")
    for setting, order, epochs in zip(of_source, spec.orders, spec.epochs_begun, strict=True):
        if epochs > _MOST_EPOCHS:
            raise ConfigError(
                f"{spec.steps:,} steps of train.total_batch {spec.total_batch:,} are {epochs:,} epochs of the "
                f"{order.kept:,} sequences of {setting}, more than {_MOST_EPOCHS:,}: lower train.steps, "
                f"train.total_batch{' or its weight' if spec.mixed else ''}, or give more data"
            )
    return spec


def _weighed(spec: PlanSpec) -> tuple[Source, ...]:
    """The sources of ``spec`` with their parts of all sequences: by their weights or, without any, by their length."""
    if not spec.mixed:
        return ()
    weights = [source.weight for source in spec.sources]
    parts = normalised(weights if any(weights) else [order.kept for order in spec.orders])
    return tuple(replace(source, weight=part) for source, part in zip(spec.sources, parts, strict=True))


def _sequences(spec: PlanSpec, entry: Skip, of_source: list[str]) -> tuple[int, int]:
    """The microshards that ``entry`` names."""
    named = [i for i, shard in enumerate(spec.shards) if f"/{shard.path}".endswith(f"/{entry.shard}")]
    if len(named) != 1:
        raise DataError(
            f"data.skip names shard {entry.shard}, of which {', '.join(of_source)} has {len(named)}: expected one"
            + (", say more of its path" if named else "")
        )
    first, end = (int(n) for n in spec.first_microshards[named[0] : named[0] + 2])
    begin, last = entry.sequences or (0, end - first)
    if last > end - first:
        raise DataError(f"data.skip names sequences to {last} of shard {entry.shard}, which has {end - first}")
    return first + begin, first + last


def plan_frame(spark: SparkSession, spec: PlanSpec) -> DataFrame:
    """The whole plan, one row per position and in that order: the columns of :class:`sparktrain.plan.Assignment`."""
    frame = located(spark, microshards(spark, spec), spec)
    step, slot = _step_and_slot(spec)
    return frame.select(
        step.alias("step"),
        slot.cast("int").alias("slot"),
        "pos",
        F.col("epoch").cast("int").alias("epoch"),
        "microshard_id",
        "path",
        ((F.col("microshard_id") - F.col("first")) * F.col("stride")).alias("start"),
        F.lit(spec.window_length).alias("length"),
    )


def write_plan(spark: SparkSession, spec: PlanSpec, directory: RunDir) -> None:
    """Write the plan to the run directory, unless the same plan is there already; ``plan.json`` comes last."""
    if directory.plan_spec() == spec:
        return
    directory.drop_plan()
    try:
        storage.remove(directory.plan)
        directory.plan.mkdir()
    except OSError as error:
        raise LaunchError(f"{directory.plan} cannot be replaced: {error.strerror or error}; remove it") from None
    rows = -(-spec.num_positions // parallelism(spark))
    rows = min(max(rows, _LEAST_ROWS), _MOST_ROWS)
    parts = -(-spec.num_positions // rows)
    tasks = spark.range(0, parts, numPartitions=parts)
    for row in tasks.mapInArrow(partial(_write, spec, directory.plan, rows), "problem string").collect():
        raise LaunchError(f"the plan cannot be written to {directory.plan}: {row.problem}; make room, or mend that")
    directory.write_plan_spec(spec)


def _write(spec: PlanSpec, directory: Path, rows: int, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        problems = []
        for part in batch.column(0).to_pylist():
            end = min((part + 1) * rows, spec.num_positions)
            try:
                files.write_part(spec, part * rows, end, directory / f"part-{part:05d}.parquet")
            except OSError as error:
                problems.append(error.strerror or str(error))
        yield pa.RecordBatch.from_pydict({"problem": pa.array(problems, pa.string())})


def assignments(spark: SparkSession, run_dir: str | Path, world_size: int, weights: Sequence[float] = ()) -> DataFrame:
    """The plan of ``run_dir`` with the ``rank`` that takes each row when ``world_size`` ranks share it, by their speed
    where ``weights`` are given.

    Raises :class:`DataError` where there is no plan.
    """
    directory = RunDir(run_dir)
    spec = directory.plan_spec()
    if spec is None:
        raise DataError(f"{run_dir} holds no plan: make one with jobs/train.py")
    if not 1 <= world_size <= spec.smallest_batch:
        raise ValueError(
            f"world_size is {world_size}: expected 1 to train.total_batch {spec.smallest_batch} (the least of its ramp)"
        )
    by_step = [(stretch.first_step, _rank(world_size, stretch.batch, weights)) for stretch in spec.stretches]
    parts = [directory.plan] if storage.is_local(directory.plan) else sorted(directory.plan.glob("*.parquet"))
    return stored.read(spark, parts).select("*", _piecewise(F.col("step"), by_step).alias("rank"))


def _rank(world: int, batch: int, weights: Sequence[float]) -> Column:
    """Column of the rank that has a slot: the inverse of :func:`slots_of`."""
    if not weights:
        return F.expr(f"cast(((slot + 1) * {world} - 1) div {batch} as int)")
    firsts = [(slots_of(rank, world, batch, weights)[0], F.lit(rank)) for rank in range(world)]
    return _piecewise(F.col("slot"), firsts)


def _step_and_slot(spec: PlanSpec) -> tuple[Column, Column]:
    """Columns of a row's step and slot, by its ``pos``."""
    pos, steps, slots = F.col("pos"), [], []
    for stretch in spec.stretches:
        since = pos - stretch.first_position
        step = F.call_function("div", since, F.lit(stretch.batch)) + stretch.first_step
        steps.append((stretch.first_position, step))
        slots.append((stretch.first_position, since % stretch.batch))
    return _piecewise(pos, steps), _piecewise(pos, slots)


def _piecewise(value: Column, pieces: list[tuple[int, Column]]) -> Column:
    """The last of ``pieces``, which ascend, whose bound is not above ``value``."""
    chosen = pieces[0][1]
    for bound, piece in pieces[1:]:
        chosen = F.when(value >= bound, piece).otherwise(chosen)
    return chosen


def located(spark: SparkSession, frame: DataFrame, spec: PlanSpec) -> DataFrame:
    """Add the shard's ``path``, ``stride`` and ``first`` microshard to rows with a ``microshard_id``.

    An equality join on buckets of microshards: a range join would compare every row with every shard.
    """
    firsts = spec.first_microshards.tolist()
    width = max(1, spec.num_microshards // (4 * len(spec.shards)))
    buckets = [
        (bucket, first, end, shard.path, stride_of(shard, spec.sequence_length))
        for shard, first, end in zip(spec.shards, firsts, firsts[1:], strict=False)
        for bucket in range(first // width, (end - 1) // width + 1)
    ]
    table = spark.createDataFrame(buckets, "bucket long, first long, end long, path string, stride long")
    within = (F.col("microshard_id") >= F.col("first")) & (F.col("microshard_id") < F.col("end"))
    bucket = F.expr(f"microshard_id div {width}") == F.col("bucket")
    # A left join, though every row has its shard: for an inner one Spark would first drop rows whose number is null,
    # and for that compute it all twice, with each round's expression copied into the next: 2^rounds hashes per row.
    return frame.join(F.broadcast(table), bucket & within, "left")
