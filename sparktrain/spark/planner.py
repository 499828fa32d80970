"""The plan as Spark DataFrames: order microshards, write the plan, and view it by rank.

The numbers are ``plan.py``'s, computed in SQL: a map-only job from position to microshard, whose output is in step
order without a shuffle or a sort. Cycle walking is not left to SQL: the fewer than sqrt(N) positions per epoch that
walk are computed on the driver and joined as a table.
"""

import re
from pathlib import Path

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from sparktrain.errors import DataError
from sparktrain.plan import PlanSpec, permute, radices, round_keys, stride_of, walkers
from sparktrain.rundir import RunDir


def plan_frame(spark: SparkSession, spec: PlanSpec) -> DataFrame:
    """The whole plan, one row per position and in that order: the columns of :class:`sparktrain.plan.Assignment`."""
    n = spec.num_microshards
    a, b = radices(n)
    pos = F.col("pos")
    frame = spark.range(spec.num_positions).select(F.col("id").alias("pos"))
    frame = frame.withColumn("epoch", F.expr(f"pos div {n}")).withColumn("i", F.expr(f"pos % {n}"))
    frame = frame.join(F.broadcast(_epoch_keys(spark, spec)), "epoch")
    frame = frame.withColumn("left", F.expr(f"i div {b}")).withColumn("right", F.expr(f"i % {b}"))
    for r in range(spec.rounds):
        # One projection per round: Spark would otherwise copy the expression of a round into each use of it.
        frame = frame.select(
            "pos", "epoch", "i", *[f"k{later}" for later in range(r + 1, spec.rounds)],
            F.col("right").alias("left"),
            ((F.col("left") + _round(F.col("right"), F.col(f"k{r}"))) % a).alias("right"),
        )  # fmt: skip
        a, b = b, a
    walked = F.broadcast(_walked(spark, spec))
    frame = frame.join(walked, ["epoch", "i"], "left").withColumn(
        "microshard_id", F.coalesce(F.col("walked"), F.col("left") * b + F.col("right"))
    )
    located = _locate(spark, frame, spec)
    batch = spec.total_batch
    return located.select(
        F.expr(f"pos div {batch}").alias("step"),
        F.expr(f"cast(pos % {batch} as int)").alias("slot"),
        pos,
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
    (directory.path / "plan.json").unlink(missing_ok=True)
    plan_frame(spark, spec).write.mode("overwrite").parquet(f"file://{directory.plan}")
    directory.write_plan_spec(spec)


def assignments(spark: SparkSession, run_dir: str | Path, world_size: int) -> DataFrame:
    """The plan of ``run_dir`` with the ``rank`` that takes each row when ``world_size`` ranks share it.

    Raises :class:`DataError` where there is no plan.
    """
    directory = RunDir(run_dir)
    spec = directory.plan_spec()
    if spec is None:
        raise DataError(f"{run_dir} holds no plan: make one with jobs/train.py")
    if not 1 <= world_size <= spec.total_batch:
        raise ValueError(f"world_size is {world_size}: expected 1 to train.total_batch {spec.total_batch}")
    # Inverse of slots_of: rank r has slots [r*B//W, (r+1)*B//W).
    rank = F.expr(f"cast(((slot + 1) * {world_size} - 1) div {spec.total_batch} as int)")
    return spark.read.parquet(_literal(directory.plan)).select("*", rank.alias("rank"))


def _literal(path: Path) -> str:
    """``path`` for Spark's readers, which take ``[1]`` for a pattern; they do not know percent-encoding."""
    return "file://" + re.sub(r"([][{}*?\\])", r"\\\1", str(path))


def _round(right: Column, key: Column) -> Column:
    return F.pmod(F.xxhash64(right, key), F.lit(2**31 - 1))


def _epoch_keys(spark: SparkSession, spec: PlanSpec) -> DataFrame:
    rows = [(e, *round_keys(spec.seed, e, spec.rounds)) for e in range(spec.num_epochs)]
    return spark.createDataFrame(rows, ", ".join(["epoch long", *(f"k{r} long" for r in range(spec.rounds))]))


def _walked(spark: SparkSession, spec: PlanSpec) -> DataFrame:
    """(epoch, i, walked): where the few inputs end up that one Feistel step leads out of [0, N)."""
    n, rows = spec.num_microshards, []
    for epoch in range(spec.num_epochs):
        keys = round_keys(spec.seed, epoch, spec.rounds)
        i = walkers(n, keys)
        rows += [(epoch, *pair) for pair in zip(i.tolist(), permute(i, n, keys).tolist(), strict=True)]
    return spark.createDataFrame(rows, "epoch long, i long, walked long")


def _locate(spark: SparkSession, frame: DataFrame, spec: PlanSpec) -> DataFrame:
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
    return frame.join(F.broadcast(table), bucket & within)
