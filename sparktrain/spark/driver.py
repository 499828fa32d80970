"""A run from the driver: check everything, write the plan, start the ranks, merge what they hand back."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyspark.sql import SparkSession

from sparktrain.changes import Changes
from sparktrain.config import RunConfig
from sparktrain.errors import Changed, DataError, LaunchError
from sparktrain.plan import PlanSpec
from sparktrain.results import Asked, RankResult, RunResult, shares
from sparktrain.rundir import RunDir
from sparktrain.spark import digesting, index, launch, planner, preflight, progress, sanity, task, trackers
from sparktrain.spark.signals import unwinding
from sparktrain.tokens import Shard
from sparktrain.tokens.sources import is_local

_ATTEMPTS_WITHOUT_PROGRESS = 3


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check: its resolved settings, its plan, and what its model needs."""

    config: RunConfig
    spec: PlanSpec
    model: dict[str, Any]

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """What is planned of each source of a mixture."""
        sequences = self.spec.sequences_of_sources if self.spec.mixed else []
        return shares.given(
            [Asked(*one) for one in self.spec.asked], sequences, [n * (self.spec.window_length - 1) for n in sequences]
        )

    def describe(self) -> str:
        """Rows, tokens, steps, and bytes per strategy, for people."""
        spec, launch_, world = self.spec, self.config.launch, self.config.launch.ranks
        batches = " to ".join(str(stretch.batch) for stretch in spec.stretches)
        sharded = self.config.data.pipeline == "sharded"
        where = f"{len(spec.shards)} shards" if sharded else f"{spec.shards[0].format} {spec.shards[0].path}"
        lines = [
            f"model      {self.config.model.architecture}, {self.model['num_parameters']:,} parameters, "
            f"vocabulary {self.model['vocab_size']:,}",
            f"data       {where}, {sum(s.num_tokens for s in spec.shards):,} tokens, "
            f"{spec.num_microshards:,} sequences of {spec.sequence_length}",
            f"plan       {spec.num_positions:,} rows: {spec.steps:,} steps of {batches} sequences, "
            f"{spec.num_positions * (spec.window_length - 1):,} tokens, "
            f"{spec.num_positions / sum(order.kept for order in spec.orders):.2f} epochs",
            *(f"source     {line}" for line in shares.lines(self.sources)),
            f"ranks      {world}, {launch_.mode}, {launch_.threads} threads each",
        ]
        ring = max(1, int(self.model["traffic"]["adamw"]["bytes_received"]))
        for kind, moved in self.model["traffic"].items():
            chosen = " (chosen)" if kind == self.config.strategy.kind else ""
            less = (
                f"{ring / moved['bytes_received']:,.1f} x less than all-reduce" if moved["bytes_received"] else "alone"
            )
            lines.append(
                f"bytes      {kind}: payload {moved['payload_bytes']:,}, received {moved['bytes_received']:,} per step "
                f"and rank, {less}{chosen}"
            )
        chosen = self.model["traffic"][self.config.strategy.kind]
        return "\n".join([*lines, *sanity.table(self.model["rows"], self.config, chosen)])


def run(spark: SparkSession, config: RunConfig) -> RunResult:
    """Train by ``config`` on the cluster of ``spark``; returns when all ranks are done.

    A run directory whose run is finished is read, not trained again. Raises a subclass of
    :class:`sparktrain.errors.SparktrainError`, one line for the user, where the run cannot start or fails.
    """
    trackers.check(config)
    config = preflight.resolve(spark, config)
    directory = RunDir(config.run.dir)
    with unwinding(), directory.lock():
        directory.check(config)
        if finished := directory.finished():
            return finished
        print(_write_plan(spark, config, directory), *Changes(directory.path).describe(), sep="\n", flush=True)
        with trackers.tracking(config, directory) as tracking:
            return _train(spark, config, directory, tracking)


def plan(spark: SparkSession, config: RunConfig) -> Iterator[str]:
    """Everything :func:`run` checks, and the plan, left in the run directory for a run to begin with; lines of text."""
    config = preflight.resolve(spark, config)
    directory = RunDir(config.run.dir)
    with directory.lock():
        directory.check(config)
        yield _write_plan(spark, config, directory)
        yield f"written to {directory.plan}"


def dry_run(spark: SparkSession, config: RunConfig) -> str:
    """Everything :func:`run` checks, and the plan it would write, as text; nothing is left in the run directory."""
    trackers.check(config)
    config = preflight.resolve(spark, config)
    directory = RunDir(config.run.dir)
    with directory.lock():
        directory.check(config)
        prepared = _prepare(spark, config)
        first = planner.plan_frame(spark, prepared.spec).limit(5).toArrow()
    return f"{prepared.describe()}\nfirst rows of the plan:\n{_table(first)}"


def _write_plan(spark: SparkSession, config: RunConfig, directory: RunDir) -> str:
    prepared = _prepare_again(spark, config)
    directory.claim(config)
    if directory.plan_spec() != prepared.spec:
        directory.drop_plan()
        digesting.write_digests(spark, prepared.spec, config.data, directory.digests)
        planner.write_plan(spark, prepared.spec, directory)
    return prepared.describe()


def _prepare_again(spark: SparkSession, config: RunConfig) -> Prepared:
    """:func:`_prepare`, from the start where an executor is lost meanwhile: Spark never repeats a barrier stage."""
    failures = 0
    while True:
        try:
            return _prepare(spark, config)
        except Exception as error:  # py4j and Spark have no common type
            if not (lost := launch.lost_executor(error)):
                raise
            failures += 1
            few = preflight.ranks_left(spark, config) < config.launch.ranks
            if few or failures > config.launch.max_restarts:
                raise LaunchError(f"{lost} before ranks were started: start the same command again") from error
            print(f"{lost}; checks begin again, {failures} of {config.launch.max_restarts}", flush=True)


def _prepare(spark: SparkSession, config: RunConfig) -> Prepared:
    data = config.data
    located = index.locate(data)
    local = [first for found in located.values() if is_local(first := next(iter(found)))]
    # What is known soonest is checked first: a model takes seconds, few shards none, many shards minutes.
    quick = config.launch.mode == "local" and index.is_quick([uri for found in located.values() for uri in found])
    model = None if quick else preflight.check_executors(spark, config, local)
    read = index.read_shards(spark, located, data, here=quick)
    sources = [[shard for shard, _ in read[setting]] for setting in data.trained_on]
    spec = planner.spec_of(config, *sources) if sources else None
    model = model or preflight.check_executors(spark, config, local)
    for indexed in read.values():
        index.check_vocabulary(indexed, data, model["vocab_size"])
    return Prepared(config, spec or planner.spec_of(config, [Shard.from_json(model["dataset"])]), model)


def _train(spark: SparkSession, config: RunConfig, directory: RunDir, tracking: trackers.Tracking) -> RunResult:
    """Attempts, until one ends well or fails for good."""
    ranks, failures, without_progress = config.launch.ranks, 0, 0
    while True:
        progress = directory.checkpoints.latest_step()
        try:
            result = _attempt(spark, config, directory, ranks, tracking)
            tracking.finish(result)
            return result
        except LaunchError as error:
            directory.check_owner()
            if error.exit_code == Changed.exit_code:
                print(error, flush=True)
                continue
            failures += 1
            without_progress = 0 if directory.checkpoints.latest_step() > progress else without_progress + 1
            if not error.transient or failures > config.launch.max_restarts:
                raise
            if without_progress == _ATTEMPTS_WITHOUT_PROGRESS:
                raise LaunchError(
                    f"{error} ({without_progress} attempts in a row came to no new checkpoint)"
                ) from error
            # Ranks whose torchrun or executor is gone have their grace: the next ones are not to meet them.
            wait = max(config.launch.grace, min(60.0, 2.0**without_progress))
            print(f"{error}; restart {failures} of {config.launch.max_restarts} in {wait:.0f} s", flush=True)
            time.sleep(wait)
            ranks = preflight.ranks_left(spark, config)


def _attempt(
    spark: SparkSession, config: RunConfig, directory: RunDir, ranks: int, tracking: trackers.Tracking
) -> RunResult:
    local = config.launch.mode == "local"
    generation = directory.new_generation()
    job = task.Job(
        run_dir=str(directory.path),
        log_dir=str(directory.logs(generation)),
        generation=generation,
        run_id=directory.run_id(),
        import_path=preflight.import_path(),
        threads=config.launch.threads,
        launcher=config.launch.launcher,
        grace=config.launch.grace,
    )
    with progress.shown(directory, generation, ranks, config.train.steps, tracking.log):
        launch.launch(spark, job, ranks, local, preflight.uses_gpu(spark, local))
    outcomes = [o for o in directory.outcomes(job.generation) if isinstance(o, RankResult)]
    if not outcomes:
        raise DataError(f"no rank left an output file in {directory.generation(job.generation)}: is run.dir shared?")
    result = directory.merge(outcomes)
    directory.write_result(result)
    return result


def _table(rows: pa.Table) -> str:
    """``rows`` in columns."""
    cells = [rows.column_names] + [[str(v) for v in row.values()] for row in rows.to_pylist()]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
