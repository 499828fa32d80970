"""A run directory's Parquet files as Spark frames: read by Spark itself on a file system, by its tasks with fsspec in a
store, for which a Spark need have no Hadoop driver."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession

from sparktrain import storage
from sparktrain.spark.context import parallelism

# Of a file that is read by a task, handed to Spark at a time.
_ROWS = 1 << 16
# The plan's pages have checksums, which Spark does not look at unless it is told to.
_CHECKSUMS = "parquet.page.verify-checksum.enabled"


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


def _get(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        for name in batch.column(0).to_pylist():
            with storage.place(name).open("rb") as file:
                yield from pq.ParquetFile(file, page_checksum_verification=True).iter_batches(_ROWS)
