"""The plan as Parquet files: a part of it written, by whoever has the spec."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparktrain.atomic import write
from sparktrain.plan.spec import PlanSpec
from sparktrain.plan.table import columns

# A rank's rows of some steps decode the row groups that hold them, whole.
_GROUP = 1 << 16

_SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64()),
        pa.field("slot", pa.int32()),
        pa.field("pos", pa.int64()),
        pa.field("epoch", pa.int32()),
        pa.field("microshard_id", pa.int64()),
        pa.field("path", pa.dictionary(pa.int32(), pa.string())),
        pa.field("start", pa.int64()),
        pa.field("length", pa.int32()),
    ]
)
# What counts up is a few bits a row as differences. Numbers in any order are found in no dictionary.
_DIFFERENCES = dict.fromkeys(("step", "slot", "pos", "microshard_id", "start"), "DELTA_BINARY_PACKED")
_DICTIONARY = ["epoch", "path", "length"]
# The least and the largest path of a row group help nobody, and cost as much as all else of the file.
_STATISTICS = [name for name in _SCHEMA.names if name != "path"]


def write_part(spec: PlanSpec, first_pos: int, last_pos: int, file: Path) -> None:
    """The rows of positions [first_pos, last_pos), in that order, as ``file``: whole or not at all. Its pages have
    checksums. Raises :class:`OSError`."""
    paths, content = np.array([shard.path for shard in spec.shards], dtype=object), io.BytesIO()
    options = {"column_encoding": _DIFFERENCES, "use_dictionary": _DICTIONARY, "write_statistics": _STATISTICS}
    with pq.ParquetWriter(content, _SCHEMA, store_schema=False, write_page_checksum=True, **options) as out:
        for begin in range(first_pos, last_pos, _GROUP):
            out.write_table(_table(spec, paths, begin, min(begin + _GROUP, last_pos)))
    write(file, content.getvalue())


def _table(spec: PlanSpec, paths: "np.ndarray[tuple[int], np.dtype[np.object_]]", begin: int, end: int) -> pa.Table:
    found = columns(spec, begin, end)
    # A row group's dictionary is written whole: of the shards, those that it names.
    counts = np.bincount(found["path"], minlength=len(paths))
    here = np.flatnonzero(counts)
    place = np.cumsum(counts > 0) - 1
    named = pa.DictionaryArray.from_arrays(place[found["path"]].astype(np.int32), pa.array(paths[here], pa.string()))
    return pa.table(
        [
            named if field.name == "path" else pa.array(found[field.name].astype(field.type.to_pandas_dtype()))
            for field in _SCHEMA
        ],
        names=_SCHEMA.names,
    )
