"""Spark frames as Parquet files in a run directory: Spark's own on a file system, the tasks' by fsspec in a store, for
which a Spark need have no Hadoop driver."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession

from sparktrain import storage
from sparktrain.spark.context import parallelism

# Of a file that is read by a task, handed to Spark at a time.
_ROWS = 1 << 16
# The plan's pages have checksums, which Spark does not look at unless it is told to.
_CHECKSUMS = "parquet.page.verify-checksum.enabled"


def write(frame: DataFrame, directory: Path) -> None:
    """``frame`` as the files of ``directory``, one for each partition, in place of what is there."""
    if storage.is_local(directory):
        frame.write.mode("overwrite").parquet(f"file://{directory}")
        return
    storage.remove(directory)
    frame.mapInArrow(partial(_put, directory), "rows long").collect()


def read(spark: SparkSession, files: Sequence[Path], schema: str | None = None) -> DataFrame:
    """What is in ``files``, of columns ``schema`` (DDL) or those of the first."""
    if all(map(storage.is_local, files)):
        reader = spark.read.option(_CHECKSUMS, True)
        reader = reader.schema(schema) if schema else reader
        return reader.parquet(*map(literal, files))
    if schema is None:
        with files[0].open("rb") as first:
            columns = pq.read_schema(first)
        schema = spark.createDataFrame(columns.empty_table()).schema.simpleString().removeprefix("struct<")[:-1]
    names = spark.createDataFrame(pa.table({"file": [str(file) for file in files]}))
    return names.repartition(min(len(files), 4 * parallelism(spark))).mapInArrow(_get, schema)


def literal(path: Path) -> str:
    """``path`` for Spark's readers, which take ``[1]`` for a pattern; they do not know percent-encoding."""
    return "file://" + re.sub(r"([][{}*?\\])", r"\\\1", str(path))


def _put(directory: Path, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """A task that is repeated puts the same file again."""
    number, count, content = TaskContext.get().partitionId(), 0, io.BytesIO()  # type: ignore[union-attr]
    writer: Any = None
    for batch in batches:
        writer = writer or pq.ParquetWriter(content, batch.schema)
        writer.write_batch(batch)
        count += batch.num_rows
    if writer:
        writer.close()
        (directory / f"part-{number:05d}.parquet").write_bytes(content.getvalue())
    yield pa.RecordBatch.from_pydict({"rows": [count]})


def _get(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for name in batch.column(0).to_pylist():
            with storage.place(name).open("rb") as file:
                yield from pq.ParquetFile(file, page_checksum_verification=True).iter_batches(_ROWS)
