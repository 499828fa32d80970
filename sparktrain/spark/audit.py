"""Was every sequence trained on that was to be, once, and with its own bytes: SQL over plan, receipts and lineage.

Receipts count where the attempt that gave them committed their step (``lineage.py``), so that what a killed attempt
read after its last checkpoint is neither missing nor doubled. A run that is not finished is audited up to its newest
checkpoint. Nothing here depends on the number of ranks.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from py4j.protocol import Py4JJavaError  # type: ignore[import-untyped]
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from sparktrain.config import RunConfig
from sparktrain.errors import DataError
from sparktrain.lineage import Committed, committed
from sparktrain.plan import Order, PlanSpec
from sparktrain.receipts import SCHEMA
from sparktrain.rundir import RunDir
from sparktrain.spark import planner, reread
from sparktrain.spark.checks import CHECKS, MEND_BYTES, Check

# What an SQL query names: frames and numbers.
Names = dict[str, Any]
# The plan's pages have checksums, which Spark does not look at unless it is told to.
_CHECKSUMS = "parquet.page.verify-checksum.enabled"
# Standard deviations at which the mix of the files is no chance any more.
_ALARM = 6


def audit(spark: SparkSession, run_dir: Path, reread_bytes: bool = True) -> Iterator[str]:
    """A line for each check of the run directory, and a summary. Raises :class:`DataError` at the end where any found
    something wrong. ``reread_bytes``: read again what was trained on, and compare."""
    try:
        yield from _audit(spark, run_dir, reread_bytes)
    except (PySparkException, Py4JJavaError) as error:
        causes = [line for line in str(error).splitlines() if line.startswith("Caused by: ")] or str(error).splitlines()
        cause = causes[-1].removeprefix("Caused by: ")
        raise DataError(f"{run_dir} cannot be audited: {cause}; restore the file, or mend the cluster") from error


def _audit(spark: SparkSession, run_dir: Path, reread_bytes: bool) -> Iterator[str]:
    directory = RunDir(run_dir)
    config, spec = directory.config(), directory.plan_spec()
    if spec is None:
        raise DataError(f"{run_dir} holds no plan: make one with jobs/plan.py or jobs/train.py")
    lineage = committed(directory, spec.steps)
    names, wrong = names_of(spark, directory, spec, lineage), {}
    yield from _history(lineage, spec)
    for check in CHECKS:
        wrong[check.name], line = run_check(spark, names, check)
        yield line
    yield f"C8     {_mix(spark, names, spec)}"
    in_shards = config.data.pipeline == "sharded"
    for name, holds, found in _bytes(spark, names, spec, config) if reread_bytes and in_shards else ():
        wrong[name], line = _judge(name, holds, MEND_BYTES, found)
        yield line
    yield _summary(spark, names, spec, wrong)
    bad = [name for name, number in wrong.items() if number]
    if bad:
        raise DataError(f"{run_dir}: {', '.join(bad)} found something wrong, see the lines above")


def run_check(spark: SparkSession, names: Names, check: Check) -> tuple[int, str]:
    """How many rows ``check`` finds, and its line."""
    return _judge(check.name, check.holds, check.mend, spark.sql(check.query, **names))


def names_of(spark: SparkSession, directory: RunDir, spec: PlanSpec, lineage: list[Committed]) -> Names:
    """All that the checks name. Raises :class:`DataError` for a file that is no Parquet file or holds other columns."""
    plan = [_readable(file, None) for file in sorted(directory.plan.glob("*.parquet"))]
    attempts = sorted({stretch.generation for stretch in lineage})
    files = [file for number in attempts for file in sorted(directory.generation(number).glob("receipts-*.parquet"))]
    if files:
        columns = ", ".join(f"{name} long" for name in SCHEMA.names)
        read = spark.read.schema(columns).parquet(*(planner.literal(_readable(file, SCHEMA)) for file in files))
    else:
        read = spark.createDataFrame(SCHEMA.empty_table())
    stretches = _table(spark, lineage, "generation", "first_step", "last_step", "world")
    counted = """select r.* from {read} r join {lineage} l on r.generation = l.generation
                 and r.step >= l.first_step and r.step < l.last_step"""
    return {
        "plan": spark.read.option(_CHECKSUMS, True).parquet(*map(planner.literal, plan)),
        "promised": planner.plan_frame(spark, spec),
        "counted": spark.sql(counted, read=read, lineage=stretches),
        "sources": _sources(spark, spec),
        "skipped": _table(spark, spec.skipped, "first", "last"),
        "stretches": _stretches(spark, spec),
        "shards": _shards(spark, spec),
        "positions": spec.num_positions,
        "committed": lineage[-1].last_step if lineage else 0,
        "length": spec.window_length,
    }


def _readable(file: Path, schema: pa.Schema | None) -> Path:
    try:
        found = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}: restore it from a copy") from None
    if schema and not found.equals(schema):
        raise DataError(f"{file} holds no receipts, but columns {', '.join(found.names)}: restore it from a copy")
    return file


def _sources(spark: SparkSession, spec: PlanSpec) -> DataFrame:
    """Of each source its microshards [first, last), and of those that are not skipped: how many, the least, the most,
    their sum."""
    rows = []
    for number, (order, first) in enumerate(zip(spec.orders, spec.first_of_sources, strict=True)):
        gone = sum((b - a) * (2 * first + a + b - 1) // 2 for a, b in order.skipped)
        total = order.n * (2 * first + order.n - 1) // 2 - gone
        least, most = _ends(order)
        rows.append((number, first, first + order.n, order.kept, first + least, first + most, str(total)))
    table = _table(spark, rows, "source", "first", "last", "kept", "least", "most", total=pa.string())
    return table.selectExpr("*", "cast(total as decimal(38, 0)) promised").drop("total")


def _ends(order: Order) -> tuple[int, int]:
    """The first and the last microshard of a source that are not skipped."""
    skipped = order.skipped
    least = skipped[0][1] if skipped and skipped[0][0] == 0 else 0
    return least, (skipped[-1][0] if skipped and skipped[-1][1] == order.n else order.n) - 1


def _stretches(spark: SparkSession, spec: PlanSpec) -> DataFrame:
    ends = [*(stretch.first_step for stretch in spec.stretches[1:]), spec.steps]
    rows = [(s.first_step, min(end, spec.steps), s.batch) for s, end in zip(spec.stretches, ends, strict=True)]
    return _table(spark, rows, "first_step", "last_step", "batch")


def _shards(spark: SparkSession, spec: PlanSpec) -> DataFrame:
    """Of each shard its tokens, and the part of all draws that falls to it."""
    firsts, ends = spec.first_microshards[:-1], spec.first_microshards[1:]
    kept = (ends - firsts).astype(np.float64)
    for first, last in spec.skipped:
        kept -= np.maximum(0, np.minimum(ends, last) - np.maximum(firsts, first))
    drawn = np.array(spec.draws_before(spec.num_positions), dtype=np.float64)
    per_microshard = drawn / drawn.sum() / [order.kept for order in spec.orders]
    share = kept * per_microshard[np.searchsorted(spec.first_of_sources, firsts, side="right") - 1]
    rows = [(s.num_tokens, s.path, float(p)) for s, p in zip(spec.shards, share, strict=True)]
    return _table(spark, rows, "num_tokens", path=pa.string(), share=pa.float64())


def _table(spark: SparkSession, rows: Iterable[tuple[Any, ...]], *numbers: str, **others: pa.DataType) -> DataFrame:
    """A small table, by Arrow: of rows of Python's Spark makes a job of its own."""
    schema = pa.schema([*((name, pa.int64()) for name in numbers), *others.items()])
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return spark.createDataFrame(pa.table([pa.array(c, t) for c, t in zip(columns, schema.types, strict=True)], schema))


def _mix(spark: SparkSession, names: Names, spec: PlanSpec) -> str:
    """C8, an alarm and no error: chi-squared of the files' mix, the mean over steps, beside what chance makes of it.
    Blocks of c move together, which multiplies it by c."""
    query = """select sum(chi2) total, count(*) steps, sum(1 / batch) inverse from (
                 select step, max(batch) batch, sum(n * n / (batch * share)) - max(batch) chi2
                 from (select step, path, count(*) n from {plan} group by step, path)
                 join {shards} using (path) join {stretches} on step >= first_step and step < last_step
                 where share > 0 group by step)"""
    shares = [row.share for row in names["shards"].where("share > 0").collect()]
    k = len(shares)
    if k < 2 or spec.order == "sequential":
        return f"ok     the mix of the files is not judged: {'one shard' if k < 2 else 'they come one after the other'}"
    total, steps, inverse = spark.sql(query, **names).collect()[0]
    variance = 2 * (k - 1) * steps + (sum(1 / p for p in shares) - k * k - 2 * k + 2) * inverse
    found, limit = total / steps, spec.block * (k - 1 + _ALARM * math.sqrt(variance) / steps)
    text = f"chi-squared of the files' mix is {found:,.1f} per step, {spec.block * (k - 1):,} by chance"
    if found <= limit:
        return f"ok     {text}"
    return f"note   {text}: steps are of fewer files than the order promises; look at C9"


def _bytes(
    spark: SparkSession, names: Names, spec: PlanSpec, config: RunConfig
) -> Iterator[tuple[str, str, DataFrame]]:
    read = names["counted"].groupBy("microshard_id", "digest", "targets").count()
    inside = read.where(f"microshard_id >= 0 and microshard_id < {spec.num_microshards}")
    located = planner.located(spark, inside, spec).selectExpr(
        "microshard_id", "digest", "targets", "path", "(microshard_id - first) * stride as start"
    )
    yield "bytes", "shards hold what receipts say was read", reread.misread(spec, config.data, located)
    if hashed := sum(bool(shard.sha256) for shard in spec.shards):
        holds = f"{hashed} of {len(spec.shards)} shards have the sha256 that they were planned with"
        yield "sha256", holds, reread.changed(spark, spec, config.data)


def _judge(name: str, holds: str, mend: str, found: DataFrame) -> tuple[int, str]:
    number, first = found.selectExpr("count(*)", "min(found)").collect()[0]
    if number:
        return number, f"{name:<7}WRONG  {number:,} found, such as: {first}; {mend}"
    return 0, f"{name:<7}ok     {holds}"


def _history(lineage: list[Committed], spec: PlanSpec) -> Iterator[str]:
    done = lineage[-1].last_step if lineage else 0
    yield f"steps  {done:,} of {spec.steps:,} are committed{'' if done else ': there is no checkpoint yet'}"
    for generation in dict.fromkeys(stretch.generation for stretch in lineage):
        own = [stretch for stretch in lineage if stretch.generation == generation]
        first, last, ranks = own[0].first_step, own[-1].last_step, own[0].world
        yield f"       {first} to {last - 1} by attempt {generation} with {ranks} rank{'s' * (ranks > 1)}"


def _summary(spark: SparkSession, names: Names, spec: PlanSpec, wrong: dict[str, int]) -> str:
    """The ledger in one line."""
    consumed = names["counted"].count()
    kinds = dict.fromkeys(("missing", "doubled", "other"), 0)
    if wrong["C5"]:
        query = next(check.query for check in CHECKS if check.name == "C5")
        kinds |= {row.kind: row["count"] for row in spark.sql(query, **names).groupBy("kind").count().collect()}
    planned = spec.first_position(names["committed"])
    bytes_ = f"{wrong['bytes']:,}" if "bytes" in wrong else "not looked for"
    return (
        f"ledger {planned:,} planned, {consumed:,} consumed, {kinds['missing']:,} missing, {kinds['doubled']:,} "
        f"doubled, {kinds['other']:,} other than planned, wrong bytes: {bytes_}"
    )
