"""Executors write down what each microshard's bytes are, before anything is trained on (``digests.py``)."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession

from sparktrain import storage
from sparktrain.atomic import write
from sparktrain.config import Data
from sparktrain.digests import file_of
from sparktrain.errors import DataError
from sparktrain.plan import PlanSpec, stride_of
from sparktrain.tokens import TokenFile
from sparktrain.tokens.sources import is_local, reach


def write_digests(spark: SparkSession, spec: PlanSpec, data: Data, directory: Path) -> None:
    """Digests of all shards that are local or come through a cache, into ``directory``, one task per shard. Raises
    :class:`DataError` for one that cannot be read."""
    storage.remove(directory)
    directory.mkdir()
    at_hand = [n for n, s in enumerate(spec.shards) if is_local(s.path) or (data.cache_dir and s.sha256)]
    if not at_hand or data.pipeline != "sharded":
        return
    numbers = spark.createDataFrame(pa.table({"number": at_hand}))
    tasks = numbers.repartition(min(len(at_hand), 4 * spark.sparkContext.defaultParallelism))
    problems = tasks.mapInArrow(partial(_digest, spec, data, directory), "problem string").collect()
    for row in problems:
        raise DataError(row.problem)


def _digest(spec: PlanSpec, data: Data, directory: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    opener = reach.opener(data, reach.known(spec.shards))
    for batch in batches:
        problems = []
        for number in batch.column("number").to_pylist():
            shard = spec.shards[number]
            stride, count = stride_of(shard, spec.sequence_length), int(np.diff(spec.first_microshards)[number])
            try:
                file = TokenFile(shard, opener)
                windows = (file.window(i * stride, spec.window_length, documents=False) for i in range(count))
                found = [file.digest_of(window) for window in windows]
                file.close()
                write(file_of(directory, number), np.array(found, dtype="<u4").tobytes())
            except DataError as error:
                problems.append(str(error))
        yield pa.RecordBatch.from_pydict({"problem": pa.array(problems, pa.string())})
