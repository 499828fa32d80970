"""Parquet with a list column: each row is one window of tokens, all of one length.

``input_ids`` or, as Psyche's preprocessed data has it, ``inputs``: lists of integers, the tokens
``labels``            lists of the same length, the token at its own place or -100 where it is no target
``position_ids``      lists of the same length
``sequence_lengths``  lists of any length: tokens of each document packed in the row; what they leave is one more

The last three may be missing; other columns are not read, but an ``attention_mask`` that leaves tokens out is refused
where no ``labels`` say that they are no targets. As a row was cut by whoever wrote it, it is trained on whole:
rows of L tokens need a window of L. A row group is decoded at a time, and the last ones are kept, up to 256 MiB. The
plan's order is random, so in larger data each row costs its row group: write groups of 100 rows or fewer (1 million
tokens/s and core where rows have 2,048 tokens; 0.05 million with groups of 1,000).
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sparktrain.errors import DataError
from sparktrain.tokens.kept import Kept
from sparktrain.tokens.sequences import IGNORED, Ints, Window, restarts
from sparktrain.tokens.shard import Shard
from sparktrain.tokens.source import Opener, Source

_TOKENS = ("inputs", "input_ids")
_LEAST = {"labels": 0, "position_ids": 0, "sequence_lengths": 1}
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
# Decoded row groups kept by all readers of a process together, and the most that one may have.
_KEPT_BYTES = 256 << 20
_GROUP_BYTES = 1 << 30

# A column of a row group: its values, and where each row's begin (the last entry: where the last one's end).
_Group = dict[str, tuple[npt.NDArray[Any], Ints]]


def inspect(source: Source, open_if_there: Opener, token_size: int | None) -> Shard | None:
    """The shard that ``source`` is, by its footer."""
    path = source.uri
    with _in_one_line(path):
        file = pq.ParquetFile(_File(source))
    schema, metadata = file.schema_arrow, file.metadata
    name = _column(path, schema)
    columns = tuple(column for column in _LEAST if column in schema.names)
    used = (name, *columns)
    for column in used:
        kind = schema.field(column).type
        if not any(is_list(kind) for is_list in _LISTS) or not pa.types.is_integer(kind.value_type):
            raise DataError(f"shard {path} has column {column} of type {kind}, expected lists of integers")
    if metadata.num_rows == 0:
        raise DataError(f"shard {path} is empty, it has no row: remove it or write it again")
    num_tokens = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = [group.column(j) for j in range(group.num_columns)]
        values = {
            column: sum(c.num_values for c in chunks if c.path_in_schema.split(".")[0] == column) for column in used
        }
        num_tokens += values[name]
        _check_mask(path, i, columns, chunks)
        if 8 * sum(values.values()) > _GROUP_BYTES:
            raise DataError(
                f"shard {path} has {sum(values.values())} values in row group {i}, more than the {_GROUP_BYTES // 8} "
                "that are read at a time: write it with smaller row groups"
            )
    row_length, left = divmod(num_tokens, metadata.num_rows)
    if left or not row_length:
        raise DataError(
            f"shard {path} has {metadata.num_rows} rows of {num_tokens} tokens in column {name}, expected rows of "
            "equal length: pack or pad them"
        )
    size = schema.field(name).type.value_type.bit_width // 8
    return Shard(path, num_tokens, size, "parquet", row_length=row_length, columns=columns)


def _check_mask(path: str, i: int, columns: tuple[str, ...], chunks: list[Any]) -> None:
    """Padding would be trained on: told by the statistics of row group ``i``, where they are there."""
    masks = [c.statistics for c in chunks if c.path_in_schema.split(".")[0] == "attention_mask"]
    if "labels" not in columns and any(m and m.has_min_max and m.min == 0 for m in masks):
        raise DataError(
            f"shard {path} has tokens in row group {i} that attention_mask leaves out, padding: pack the rows, or add "
            f"labels that are {IGNORED} there"
        )


class Rows:
    """The rows of an open shard. Raises :class:`DataError` for what is no window of tokens, when it is decoded."""

    def __init__(self, shard: Shard, source: Source, kept: "Kept[Rows, _Group] | None" = None) -> None:
        self._shard, self._kept = shard, kept or _KEPT
        with _in_one_line(shard.path):
            self._file = pq.ParquetFile(_File(source))
        metadata = self._file.metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._firsts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
        self._column = _column(shard.path, self._file.schema_arrow)
        # A ParquetFile has one position in its file.
        self._lock = threading.Lock()
        if self._firsts[-1] * shard.row_length != shard.num_tokens:
            raise DataError(f"shard {shard.path} has {self._firsts[-1]} rows, other than planned: restore it")

    def read(self, first: int, last: int) -> Window:
        """Rows [first, last), one after the other; ``sequence_lengths`` too."""
        parts: list[dict[str, npt.NDArray[Any]]] = []
        while first < last:
            i = int(np.searchsorted(self._firsts, first, side="right")) - 1
            begin, end = int(self._firsts[i]), min(last, int(self._firsts[i + 1]))
            group = self._group(i)
            parts.append({name: v[o[first - begin] : o[end - begin]] for name, (v, o) in group.items()})
            first = end
        columns = {name: np.concatenate([p[name] for p in parts]).astype(np.int64) for name in parts[0]}
        return Window(columns.pop(self._column), **columns)

    def close(self) -> None:
        self._kept.drop(self)
        self._file.close()

    def _group(self, i: int) -> _Group:
        if found := self._kept.find(self, i):
            return found
        with self._lock:  # who waits for it finds what who held it has decoded
            return self._kept.get(self, i, lambda: self._decode(i), _size)

    def _decode(self, i: int) -> _Group:
        shard = self._shard
        with _in_one_line(shard.path):
            # One thread: ranks have their cores for training, and a source may be read by one of ours only.
            table = self._file.read_row_group(i, columns=[self._column, *shard.columns], use_threads=False)
        group = {}
        for name in (self._column, *shard.columns):
            where = f"shard {shard.path} has in row group {i}, column {name},"
            values, offsets = _flat(table.column(name).combine_chunks(), where)
            if name == "sequence_lengths":
                values, offsets = self._complete(values, offsets, where)
            lengths = np.diff(offsets)
            if name != "sequence_lengths" and (wrong := np.flatnonzero(lengths != shard.row_length)).size:
                r = int(wrong[0])
                raise DataError(f"{where} row {r} of {lengths[r]} values, expected {shard.row_length}: pack or pad it")
            least = _LEAST.get(name, 0)
            wrong_ones = values[(values < least) & ((values != IGNORED) | (name != "labels"))]
            if wrong_ones.size:
                or_ignored = f", or {IGNORED}" if name == "labels" else ""
                raise DataError(
                    f"{where} the value {wrong_ones[0]}, expected {least} or more{or_ignored}: write it again"
                )
            group[name] = (values, offsets)
        if {"position_ids", "sequence_lengths"} <= group.keys():
            self._compare(group["position_ids"][0], group["sequence_lengths"][0], i)
        return group

    def _compare(self, positions: npt.NDArray[Any], lengths: npt.NDArray[Any], i: int) -> None:
        """Models tell documents by their positions: these must start again where the lengths say."""
        found = restarts(positions.astype(np.int64).reshape(-1, self._shard.row_length)).flatten()
        expected = np.zeros(len(found), dtype=np.bool_)
        expected[np.cumsum(lengths) - lengths] = True
        if (wrong := np.flatnonzero(found != expected)).size:
            row, at = divmod(int(wrong[0]), self._shard.row_length)
            raise DataError(
                f"shard {self._shard.path} has in row group {i} a row {row} whose position_ids and sequence_lengths "
                f"differ on whether a document begins at token {at}: write it again"
            )

    def _complete(self, values: npt.NDArray[Any], offsets: Ints, where: str) -> tuple[npt.NDArray[Any], Ints]:
        """``sequence_lengths`` that sum to the row's length: what follows the last document is one of its own."""
        sums = np.diff(np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[offsets])
        left = self._shard.row_length - sums
        if (left < 0).any():
            r = int(np.flatnonzero(left < 0)[0])
            raise DataError(
                f"{where} a row {r} that sums to {sums[r]}, more than its {self._shard.row_length} tokens: "
                "write it again"
            )
        short = np.flatnonzero(left)
        shift = np.concatenate([[0], np.cumsum(left > 0)])
        return np.insert(values.astype(np.int64), offsets[1:][short], left[short]), offsets + shift


def _size(group: _Group) -> int:
    return sum(values.nbytes + offsets.nbytes for values, offsets in group.values())


def _flat(column: pa.Array, where: str) -> tuple[npt.NDArray[Any], Ints]:
    """Values of a list column, and where each row's begin."""
    if column.null_count or column.flatten().null_count:
        raise DataError(f"{where} a row or value that is null: leave such rows out")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    values = column.flatten().to_numpy(zero_copy_only=False)
    if values.dtype == np.uint64:
        raise DataError(f"{where} unsigned 8-byte integers: write it as int64")
    return values, offsets


_KEPT: "Kept[Rows, _Group]" = Kept(_KEPT_BYTES)


class _File(io.RawIOBase):
    """A source as the file that pyarrow reads."""

    def __init__(self, source: Source) -> None:
        self._source, self._size, self._at = source, source.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        content = self._source.read(self._at, left if size < 0 else min(size, left))
        self._at += len(content)
        return content


def _column(path: str, schema: pa.Schema) -> str:
    for name in _TOKENS:
        if name in schema.names:
            return name
    raise DataError(
        f"shard {path} has no column {' or '.join(_TOKENS)}, it has {', '.join(schema.names[:8])}: "
        "rename the column that holds the tokens"
    )


@contextmanager
def _in_one_line(path: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"shard {path} is no Parquet file that can be read ({reason}): write it again") from None
