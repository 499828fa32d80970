"""Executors write down what each microshard's bytes are, before anything is trained on (``digests.py``).

Not while the index reads the shards: which shard has which number, and whether a run directory may be written at all,
is known after that. Bytes are hashed as they are stored, at a small part of what the index costs.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession
from zlib_ng.zlib_ng import crc32

from sparktrain import storage
from sparktrain.atomic import write
from sparktrain.config import Data
from sparktrain.digests import file_of
from sparktrain.errors import DataError
from sparktrain.plan import PlanSpec, stride_of
from sparktrain.spark.context import parallelism
from sparktrain.tokens import TokenFile, is_bare
from sparktrain.tokens.sources import is_local, reach

# Tokens that are read at a time.
_RANGE = 1 << 21


def write_digests(spark: SparkSession, spec: PlanSpec, data: Data, directory: Path) -> None:
    """Digests of all shards that are local or come through a cache, into ``directory``, one task per shard. Raises
    :class:`DataError` for one that cannot be read."""
    storage.remove(directory)
    directory.mkdir()
    at_hand = [n for n, s in enumerate(spec.shards) if is_local(s.path) or (data.cache_dir and s.sha256)]
    if not at_hand or data.pipeline != "sharded":
        return
    numbers = spark.createDataFrame(pa.table({"number": at_hand}))
    tasks = numbers.repartition(min(len(at_hand), 4 * parallelism(spark)))
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
                with closing(TokenFile(shard, opener)) as file:
                    found = list(_digests_of(file, stride, count, spec.window_length))
                write(file_of(directory, number), np.array(found, dtype="<u4").tobytes())
            except DataError as error:
                problems.append(str(error))
        yield pa.RecordBatch.from_pydict({"problem": pa.array(problems, pa.string())})


def _digests_of(file: TokenFile, stride: int, count: int, length: int) -> Iterator[int]:
    """Of each of ``count`` windows of ``length`` tokens, ``stride`` apart; where they are tokens as stored and nothing
    else, many are read at a time and none is decoded."""
    if not is_bare(file.shard):
        for i in range(count):
            yield file.digest_of(file.window(i * stride, length, documents=False))
        return
    size, most = file.shard.token_size, max(1, _RANGE // stride)
    for first in range(0, count, most):
        number = min(most, count - first)
        raw = memoryview(file.stored(first * stride, (number - 1) * stride + length))
        for begin in range(0, number * stride * size, stride * size):
            yield crc32(raw[begin : begin + length * size])
