"""Are shards still what was trained on: executors read them again and compare."""

from collections.abc import Iterable, Iterator
from functools import partial

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from sparktrain.config import Data
from sparktrain.errors import DataError
from sparktrain.plan import PlanSpec
from sparktrain.spark.context import parallelism
from sparktrain.tokens import Shard, TokenFile
from sparktrain.tokens.opened import Opened
from sparktrain.tokens.sequences import stack
from sparktrain.tokens.sources import reach, sha256_of

_FOUND = pa.schema([pa.field("found", pa.string())])


def misread(spec: PlanSpec, data: Data, located: DataFrame) -> DataFrame:
    """``found``: a line for each row of ``located`` (``microshard_id``, ``digest``, ``targets``; ``path`` and ``start``
    of where that microshard is) whose bytes there have another digest or other targets. Files are read in order."""
    in_order = located.repartition("path").sortWithinPartitions("path", "start")
    return in_order.mapInArrow(partial(_compare, data, spec), "found string")


def changed(spark: SparkSession, spec: PlanSpec, data: Data) -> DataFrame:
    """``found``: a line for each shard whose sha256 is another than when the plan was made."""
    hashed = [number for number, shard in enumerate(spec.shards) if shard.sha256]
    parts = min(len(hashed), 4 * parallelism(spark))
    numbers = spark.createDataFrame(pa.table({"number": hashed})).repartition(parts)
    return numbers.mapInArrow(partial(_hash, data, spec.shards), "found string")


def _compare(data: Data, spec: PlanSpec, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    shards = {shard.path: shard for shard in spec.shards}
    opener = reach.opener(data, reach.known(spec.shards))
    files = Opened(lambda path: TokenFile(shards[path], opener), 1)
    for batch in batches:
        found = []
        for row in batch.to_pylist():
            where = f"microshard {row['microshard_id']} ({row['path']}, token {row['start']})"
            try:
                with files.use(row["path"]) as file:
                    window = file.window(row["start"], spec.window_length, documents=False)
                    digest, targets = file.digest_of(window), stack([window]).num_targets
                if (digest, targets) != (row["digest"], row["targets"]):
                    found.append(
                        f"{where} was read with digest {row['digest']:08x} and {row['targets']} targets, has "
                        f"{digest:08x} and {targets}"
                    )
            except DataError as error:
                found.append(f"{where}: {error}")
        yield pa.RecordBatch.from_pydict({"found": found}, schema=_FOUND)
    files.close()


def _hash(data: Data, shards: tuple[Shard, ...], batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    opener = reach.opener(data, reach.known(shards))
    for batch in batches:
        found = []
        for number in batch.column("number").to_pylist():
            shard = shards[number]
            try:
                if (hash_ := sha256_of(shard.path, shard.num_bytes, opener)) != shard.sha256:
                    found.append(f"shard {shard.path} has sha256 {hash_}, had {shard.sha256} when it was planned")
            except DataError as error:
                found.append(str(error))
        yield pa.RecordBatch.from_pydict({"found": found}, schema=_FOUND)
