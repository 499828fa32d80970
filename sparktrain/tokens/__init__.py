"""Token shards: one file per format and a table of them. A shard is a file of tokens; all formats read alike.

A format module has ``inspect(source, open_if_there, token_size) -> Shard | None`` (cheap: no token is read; None: a
file of another format with that suffix) and, where it has more, ``document_ends`` and a reader of rows.
``open_if_there`` finds side files; ``token_size`` is what the user says of files that do not say it themselves. Where
the bytes are is ``sources/``.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sparktrain.errors import DataError
from sparktrain.tokens import ds, foreign, megatron, npy, parquet, raw, sources
from sparktrain.tokens.sequences import IGNORED, Ints, Sequences, Window, pieces, stack
from sparktrain.tokens.shard import Shard
from sparktrain.tokens.source import Opener, Source
from sparktrain.tokens.sources import open_if_there, open_source, reach
from sparktrain.tokens.sources.manifest import UNKNOWN, Known

__all__ = ["FORMATS", "IGNORED", "Known", "Sequences", "Shard", "TokenFile", "Window", "check_alike", "find_shards"]
__all__ += ["inspect", "locate_shards", "read_sequences", "read_windows"]


class Format(NamedTuple):
    """One format. Without ``rows``, tokens lie one after the other from ``Shard.offset`` on."""

    suffixes: tuple[str, ...]
    inspect: Callable[[Source, Opener, int | None], Shard | None]
    document_ends: Callable[[Shard, Opener], Ints] | None = None
    rows: Callable[[Shard, Source], parquet.Rows] | None = None


# Of those with one suffix, the first that takes the file has it.
FORMATS: dict[str, Format] = {
    "ds": Format((".ds",), ds.inspect, ds.document_ends),
    "megatron": Format((".bin",), megatron.inspect, megatron.document_ends),
    "npy": Format((".npy",), npy.inspect),
    "raw": Format((".bin", ".npy"), raw.inspect),
    "parquet": Format((".parquet",), parquet.inspect, rows=parquet.Rows),
}
_SUFFIXES = tuple(dict.fromkeys(suffix for row in FORMATS.values() for suffix in row.suffixes))


def find_shards(where: Path | str | Sequence[str]) -> list[str]:
    """URIs of the shards at ``where``, absolute paths where they are local; sorted, so that every machine numbers them
    alike. ``where`` is a place that :func:`sparktrain.tokens.sources.find` knows, or several."""
    found = [(uri, UNKNOWN) for place in _places(where) for uri in sources.find(place, _SUFFIXES)]
    return list(_in_order(found))


def locate_shards(where: Path | str | Sequence[str], open_if_there: Opener = open_if_there) -> dict[str, Known]:
    """The same, with size and sha256 where a manifest says them; a server that lists nothing may have a manifest."""
    return _in_order(reach.locate(_places(where), _SUFFIXES, open_if_there))


def inspect(
    path: str, token_size: int | None = None, open_if_there: Opener = open_if_there, known: Known = UNKNOWN
) -> Shard:
    """What ``path`` holds, judged by its suffix and first bytes; ``token_size`` where the file does not say it.

    Raises :class:`DataError` for a file that cannot be a shard, or that has another size than is ``known``.
    """
    source = open_source(path, open_if_there)
    try:
        num_bytes, suffix = source.size(), Path(path).suffix
        if num_bytes == 0:
            raise DataError(f"shard {path} is empty: remove it or write it again")
        _check_size(path, num_bytes, known.num_bytes)
        head = source.read(0, min(num_bytes, foreign.HEAD))
        if problem := foreign.named(head, suffix):
            raise DataError(f"shard {path} {problem}")
        candidates = (row.inspect(source, open_if_there, token_size) for row in FORMATS.values() if suffix in row[0])
        shard = next(shard for shard in candidates if shard is not None)
    finally:
        source.close()
    if shard.format in ("ds", "raw"):
        if num_bytes % shard.token_size:
            raise DataError(
                f"shard {path} has {num_bytes} bytes, not a multiple of its token size {shard.token_size}: "
                "it is torn or its token size is wrong; write it again"
            )
        if seen := foreign.misread(head, shard.token_size):
            raise DataError(f"shard {path} is read as tokens of {shard.token_size} bytes, but looks like {seen}")
    return replace(shard, num_bytes=known.num_bytes, sha256=known.sha256)


def check_alike(shards: Sequence[Shard]) -> None:
    """Raises :class:`DataError` where ``shards`` cannot come from one tokenizer, by its name or by their token size."""
    named: dict[str, str] = {}
    sized: dict[int | None, str] = {}
    for shard in shards:
        named.setdefault(shard.tokenizer, shard.path)
        # A Parquet file's integers are as wide as its writer's habit was.
        sized.setdefault(shard.token_size if shard.format != "parquet" else None, shard.path)
    named.pop("", None)
    sized.pop(None, None)
    for what, found in (("tokenizer", named), ("token size", sized)):
        if len(found) > 1:
            (a, first), (b, second) = list(found.items())[:2]
            raise DataError(
                f"shards {first} and {second} differ in their {what}, {a} and {b}: train on what one tokenizer made "
                "(jobs/tokenize.py --tokenizer)"
            )


def is_bare(shard: Shard) -> bool:
    """Whether it is tokens one after the other and nothing else."""
    return not (FORMATS[shard.format].rows or shard.columns)


class TokenFile:
    """An open shard. ``start`` and ``length`` count tokens from the file's first, in rows row after row."""

    def __init__(self, shard: Shard, open_if_there: Opener = open_if_there) -> None:
        """Raises :class:`DataError` where it cannot be opened, or has another size than when it was inspected."""
        self.shard, self._opener = shard, open_if_there
        self._source = open_source(shard.path, open_if_there)
        _check_size(shard.path, self._source.size(), shard.num_bytes)
        rows = FORMATS[shard.format].rows
        self._rows = rows(shard, self._source) if rows else None
        masked = "labels" in shard.columns and not rows
        self._mask = open_source(f"{shard.path}.loss", open_if_there) if masked else None
        self._ends: Ints | None = None

    def stored(self, start: int, length: int) -> bytes:
        """Tokens [start, start + length) as they are stored; of a shard that is bare."""
        size = self.shard.token_size
        return self._source.read(self.shard.offset + start * size, length * size)

    def fill(self, starts: Sequence[int], rows: Sequence[Sequence[memoryview]], verified: bool) -> None:
        """The same, from each of ``starts`` as many bytes as its writable rows take, one after the other. Unless
        ``verified``, they come as this machine's disk has them, without a look at the sums that a cache keeps: for a
        caller that compares digests."""
        size, offset, descriptor = self.shard.token_size, self.shard.offset, self._source.descriptor
        if descriptor is not None and not verified:
            wanted = sum(map(len, chain.from_iterable(rows)))
            with suppress(OSError):  # which is told below
                if sum(map(os.preadv, repeat(descriptor), rows, [offset + start * size for start in starts])) == wanted:
                    return
        for start, parts in zip(starts, rows, strict=True):
            at = start
            for row in parts:
                row[:] = self.stored(at, len(row) // size)
                at += len(row) // size

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length), as int64 ``[length]``; of rows, whole ones."""
        self._check_rows(start, length)
        if self._rows:
            return self._rows.read(start // self.shard.row_length, (start + length) // self.shard.row_length).tokens
        return np.frombuffer(self.stored(start, length), dtype=self.shard.dtype).astype(np.int64)

    def window(self, start: int, length: int, documents: bool = True) -> Window:
        """Tokens [start, start + length) with what comes with them: labels, positions, lengths of the documents; those
        of a stream, which nobody packed, only with ``documents``."""
        if self._rows:
            self._check_rows(start, length)
            return self._rows.read(start // self.shard.row_length, (start + length) // self.shard.row_length)
        tokens, labels = self.read(start, length), None
        if self._mask:
            mask = np.frombuffer(self._mask.read(start, length), dtype=np.uint8)
            if mask.max(initial=0) > 1:
                at = start + int(np.argmax(mask > 1))
                raise DataError(f"{self._mask.uri} has {mask.max()} at byte {at}, expected 0 or 1: write it again")
            labels = np.where(mask == 1, tokens, IGNORED)
        lengths = pieces(self.document_ends(), start, length) if documents and self.shard.num_documents else None
        return Window(tokens, labels, None, lengths)

    def digest_of(self, window: Window) -> int:
        """crc32 of a window of this file: of the bytes as they are stored, where these are tokens and nothing else; or
        of all numbers (:meth:`Window.digest`)."""
        return crc32(window.tokens.astype(self.shard.dtype).data) if is_bare(self.shard) else window.digest()

    def document_ends(self) -> Ints:
        """Ends of the documents in tokens, exclusive; empty where no boundaries are known."""
        find = FORMATS[self.shard.format].document_ends
        if self._ends is None:
            known = find is not None and self.shard.num_documents
            self._ends = find(self.shard, self._opener) if find and known else np.empty(0, dtype=np.int64)
        return self._ends

    def close(self) -> None:
        if self._rows:
            self._rows.close()
        if self._mask:
            self._mask.close()
        self._source.close()

    def _check_rows(self, start: int, length: int) -> None:
        width = self.shard.row_length
        if width and (start % width or length % width):
            raise DataError(
                f"shard {self.shard.path} has rows of {width} tokens, asked for {length} from token {start}: a row is "
                f"read whole; make data.sequence_length such that a window is {width} tokens"
            )


def read_windows(windows: list[tuple[TokenFile, int]], length: int) -> npt.NDArray[np.int64]:
    """``[len(windows), length]`` tokens of the windows that start at the given token of the given files."""
    out = np.empty((len(windows), length), dtype=np.int64)
    for i in _in_file_order(windows):
        file, start = windows[i]
        out[i] = file.read(start, length)
    return out


def read_sequences(windows: list[tuple[TokenFile, int]], length: int) -> Sequences:
    """The same windows as :func:`read_windows`, with what comes with their tokens."""
    found: dict[int, Window] = {}
    for i in _in_file_order(windows):
        file, start = windows[i]
        found[i] = file.window(start, length)
    return stack([found[i] for i in range(len(windows))])


def _places(where: Path | str | Sequence[str]) -> Sequence[str]:
    return [str(where)] if isinstance(where, str | Path) else where


def _in_order(found: list[tuple[str, Known]]) -> dict[str, Known]:
    files = sorted(os.path.realpath(uri) if sources.is_local(uri) else uri for uri, _ in found)
    if twice := next((a for a, b in pairwise(files) if a == b), None):
        raise DataError(f"shard {twice} is in the data twice, by name or by a link: name it once")
    return dict(sorted(found))


def _check_size(path: str, found: int, expected: int) -> None:
    if expected and found != expected:
        raise DataError(
            f"shard {path} has {found} bytes, expected {expected} by its manifest or the plan: it was changed or torn; "
            "restore it"
        )


def _in_file_order(windows: list[tuple[TokenFile, int]]) -> list[int]:
    """A row group is decoded once for all windows in it."""
    return sorted(range(len(windows)), key=lambda i: (windows[i][0].shard.path, windows[i][1]))
