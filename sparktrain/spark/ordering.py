"""From position to microshard in SQL: the numbers of ``plan/``, as columns.

What the arithmetic has in a loop or a list, SQL takes from small tables that the driver makes and every task has: the
keys of each epoch, the fewer than sqrt(N) inputs per epoch whose cycle must be walked, places of skipped microshards,
and one round of a mixture. Keys of these tables are one long each, which Spark looks up faster than two.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from sparktrain.plan import Ints, Order, PlanSpec
from sparktrain.plan.shuffle import permute, radices, walkers
from sparktrain.plan.skip import jumps

# What is known of a source; with one source these are constants, in a mixture columns.
_FACTS = ("source", "n", "kept", "first", "blocks", "a", "b")


def microshards(spark: SparkSession, spec: PlanSpec) -> DataFrame:
    """``pos``, ``epoch``, ``microshard_id``: one row per position and in that order."""
    positions = spark.range(spec.num_positions).select(F.col("id").alias("pos"))
    if spec.order == "psyche":
        # No map from a position alone: every Python worker makes the whole list, once.
        return positions.mapInArrow(partial(_listed, spec), "pos long, epoch long, microshard_id long")
    place = F.col("pos")
    for at, length in jumps(spec.skipped_places):
        place = place + F.when(F.col("pos") >= at, length).otherwise(0)
    frame, fact = _draws(spark, spec, positions.withColumn("place", place))
    facts = [name for name in _FACTS if spec.mixed]
    epoch, i = F.call_function("div", F.col("index"), fact["kept"]), F.col("index") % fact["kept"]
    frame = frame.select("pos", *facts, epoch.alias("epoch"), i.alias("i"))
    if spec.order == "sequential":
        found = frame.withColumn("found", F.col("i"))
    else:
        found = _shuffled(spark, spec, frame, fact, ["pos", "epoch", "i", *facts])
    if spec.skipped:
        found = _joined(spark, found, _key(spec, F.col("epoch"), F.col("i"), fact), _replaced(spec), "replaced")
        found = found.withColumn("found", F.coalesce("replaced", "found"))
    return found.select("pos", "epoch", (F.col("found") + fact["first"]).alias("microshard_id"))


def _draws(spark: SparkSession, spec: PlanSpec, frame: DataFrame) -> tuple[DataFrame, dict[str, Column]]:
    """Adds ``index``, the draws of the row's source before it; and the facts of that source."""
    facts = {
        "source": range(len(spec.orders)),
        "n": [order.n for order in spec.orders],
        "kept": [order.kept for order in spec.orders],
        "first": spec.first_of_sources,
        "blocks": [order.num_blocks for order in spec.orders],
        "a": [radices(max(1, order.num_blocks))[0] for order in spec.orders],
        "b": [radices(max(1, order.num_blocks))[1] for order in spec.orders],
    }
    if not spec.mixed:
        return frame.withColumnRenamed("place", "index"), {name: F.lit(int(v[0])) for name, v in facts.items()}
    source, draw, counts = spec.mixture
    table = {name: np.asarray(values, dtype=np.int64)[source] for name, values in facts.items()}
    table |= {"key": np.arange(len(source)), "draw": draw, "per_round": counts[source]}
    size = F.lit(len(source))
    round_ = F.call_function("div", F.col("place"), size)
    frame = frame.withColumn("round", round_).withColumn("key", F.col("place") % size)
    frame = frame.join(F.broadcast(spark.createDataFrame(pa.table(table))), "key", "left")
    frame = frame.withColumn("index", F.col("round") * F.col("per_round") + F.col("draw"))
    return frame, {name: F.col(name) for name in _FACTS}


def _shuffled(
    spark: SparkSession, spec: PlanSpec, frame: DataFrame, fact: dict[str, Column], carried: list[str]
) -> DataFrame:
    """Adds ``found``, the microshard within its source that the order has at place ``i`` with nothing skipped."""
    keys = [f"k{r}" for r in range(spec.rounds)]
    epoch_key = F.col("epoch") * len(spec.orders) + fact["source"]
    frame = _joined(spark, frame, epoch_key, _epochs(spec), *keys, "rotation")
    block, within, j = F.lit(spec.block), F.col("i") % spec.block, F.col("i")
    if spec.block > 1:
        j = F.call_function("div", F.col("i"), block)
    a, b = fact["a"], fact["b"]
    frame = frame.select(
        *carried, "rotation", *keys, j.alias("j"), F.call_function("div", j, b).alias("left"), (j % b).alias("right")
    )
    for r in range(spec.rounds):
        # One projection per round: Spark would otherwise copy the expression of a round into each use of it.
        right = (F.col("left") + _round(F.col("right"), F.col(keys[r]))) % a
        frame = frame.select(
            *carried, "rotation", "j", *keys[r + 1 :], F.col("right").alias("left"), right.alias("right")
        )
        a, b = b, a
    frame = _joined(spark, frame, _key(spec, F.col("epoch"), F.col("j"), fact), _walked(spec), "walked")
    found = F.coalesce(F.col("walked"), F.col("left") * b + F.col("right"))
    if spec.block > 1:
        found = F.when(F.col("j") < fact["blocks"], found).otherwise(F.col("j"))
        found = (found * block + within + F.col("rotation")) % fact["n"]
    return frame.select(*carried, found.alias("found"))


def _joined(spark: SparkSession, frame: DataFrame, key: Column, rows: Iterable[list[Ints]], *names: str) -> DataFrame:
    """``frame`` with columns ``names`` of the row whose first number is ``key``; null where there is none."""
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    table = pa.table(dict(zip(("key", *names), columns, strict=True)))
    return frame.withColumn("key", key).join(F.broadcast(spark.createDataFrame(table)), "key", "left").drop("key")


def _key(spec: PlanSpec, epoch: Column, place: Column, fact: dict[str, Column]) -> Column:
    """One long for a place in an epoch of a source: see :func:`_keys`."""
    return (epoch * (spec.num_microshards + 1) + place) * len(spec.orders) + fact["source"]


def _keys(spec: PlanSpec, epoch: int, places: Ints, order: Order) -> Ints:
    return (epoch * (spec.num_microshards + 1) + places) * len(spec.orders) + order.source


def _each_epoch(spec: PlanSpec) -> Iterator[tuple[Order, int]]:
    for order, drawn in zip(spec.orders, spec.draws_before(spec.num_positions), strict=True):
        for epoch in range(max(1, -(-drawn // order.kept))):
            yield order, epoch


def _epochs(spec: PlanSpec) -> Iterator[list[Ints]]:
    for order, epoch in _each_epoch(spec):
        numbers = (epoch * len(spec.orders) + order.source, *order.keys(epoch), order.rotation(epoch))
        yield [np.array([number]) for number in numbers]


def _walked(spec: PlanSpec) -> Iterator[list[Ints]]:
    """Where the few inputs end up that one Feistel step leads out of [0, blocks)."""
    for order, epoch in _each_epoch(spec):
        if order.num_blocks:
            keys = order.keys(epoch)
            inputs = walkers(order.num_blocks, keys)
            yield [_keys(spec, epoch, inputs, order), permute(inputs, order.num_blocks, keys)]
        else:
            yield [np.zeros(0, np.int64)] * 2


def _replaced(spec: PlanSpec) -> Iterator[list[Ints]]:
    for order, epoch in _each_epoch(spec):
        places, found = order.replaced(epoch)
        yield [_keys(spec, epoch, places, order), found]


def _listed(spec: PlanSpec, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        _, epoch, found = spec.contents(batch.column(0).to_numpy())
        yield pa.RecordBatch.from_pydict({"pos": batch.column(0), "epoch": epoch, "microshard_id": found})


def _round(right: Column, key: Column) -> Column:
    return F.pmod(F.xxhash64(right, key), F.lit(2**31 - 1))
