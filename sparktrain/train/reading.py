"""How a rank's share of a step is read: as rows of tokens, where all shards are tokens of one type and nothing else; or
window by window, with what comes along.

Both read a share at once, or range by range, side by side, which are then joined; and say the digest of each window.
Shapes: B_ = sequences of this rank in a step, L = tokens of a window.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from zlib_ng.zlib_ng import crc32

from sparktrain.errors import DataError
from sparktrain.plan import Ints, PlanSpec, Range, Share
from sparktrain.tokens.sequences import Sequences, Window, stack

# Tokens of a range.
RANGE = 1 << 21
Read = tuple[Sequences, list[int]]
# What the microshards of a share are to have: ``sparktrain.digests.Digests.of``.
Promised = Callable[[Share], Ints]
Stored = np.ndarray[Any, np.dtype[np.integer[Any]]]
# Rows that are read into by one system call, at most: Linux and macOS take 1,024.
_VECTORS = 1024


class File(Protocol):
    """What is needed of a :class:`sparktrain.tokens.TokenFile`."""

    def stored(self, start: int, length: int) -> bytes: ...
    def fill(self, starts: Sequence[int], rows: Sequence[Sequence[memoryview]], verified: bool) -> None: ...
    def window(self, start: int, length: int, documents: bool) -> Window: ...
    def digest_of(self, window: Window) -> int: ...


class Files(Protocol):
    """Shards that are open."""

    def use(self, name: str) -> AbstractContextManager[File]:
        """The one at this path."""


class Rows:
    """Reads tokens as they are stored, into rows ``[B_, L]`` of their type.

    A window that has another digest than was promised is read once more, from a cache by the sums that this keeps, by
    which it is fetched again where it decayed, before that is an error.
    """

    def __init__(self, files: Files, promised: Promised, spec: PlanSpec) -> None:
        self._files, self._promised = files, promised
        self._length, self._dtype = spec.window_length, spec.shards[0].dtype
        # Tokens that a window shares with the one that follows it in the shard.
        self._shared = spec.window_length - spec.sequence_length

    def read(self, share: Share) -> Read:
        (array, rows), shared = self._empty(share), self._shared
        promised = self._promised(share)
        alone, verified = list(zip(rows)), promised.min(initial=0) < 0
        joined: list[list[int]] = []
        for path, starts, runs in share.by_shard(self._length - shared, _VECTORS):
            here = [alone[run[0]] if len(run) == 1 else self._in_a_row(rows, run) for run in runs]
            with self._files.use(path) as file:
                file.fill(starts, here, verified)
            joined += [run for run in runs if len(run) > 1]
        if shared and joined:
            after, before = ([place for run in joined for place in run[part]] for part in (slice(1, None), slice(-1)))
            array[after, :shared] = array[before, -shared:]
        return self._compared(share, promised, array, rows)

    def _in_a_row(self, rows: list[memoryview], run: list[int]) -> tuple[memoryview, ...]:
        """Room for windows that follow one another: what one shares with the one before it is read into that."""
        begin = self._shared * self._dtype.itemsize
        return rows[run[0]], *(rows[place][begin:] for place in run[1:])

    def read_range(self, range_: Range) -> bytes:
        with self._files.use(range_.path) as file:
            return file.stored(range_.start, range_.length)

    def join(self, share: Share, ranges: Sequence[tuple[Range, bytes]]) -> Read:
        """What :meth:`read` gives, from what :meth:`read_range` gave."""
        (array, rows), size = self._empty(share), self._dtype.itemsize
        for range_, raw in ranges:
            view = memoryview(raw)
            for place, offset in zip(range_.places, range_.offsets, strict=True):
                rows[place][:] = view[offset * size : (offset + self._length) * size]
        return self._compared(share, self._promised(share), array, rows)

    def _empty(self, share: Share) -> tuple[Stored, list[memoryview]]:
        """Room for the windows, and that of each."""
        array = np.empty((len(share), self._length), dtype=self._dtype)
        view, size = array.data.cast("B"), self._length * self._dtype.itemsize
        return array, [view[i : i + size] for i in range(0, array.nbytes, size)]

    def _compared(self, share: Share, promised: Ints, array: Stored, rows: list[memoryview]) -> Read:
        digests = list(map(crc32, rows))
        again = _differing(promised, digests)
        for place in again:
            with self._files.use(share.paths[share.path[place]]) as file:
                rows[place][:] = file.stored(int(share.start[place]), self._length)
            digests[place] = crc32(rows[place])
        if again:
            check(share, promised, digests)
        return Sequences(array, None, None, None), digests  # type: ignore[arg-type]


class Windows:
    """Reads what there is of each window."""

    def __init__(self, files: Files, promised: Promised) -> None:
        self._files, self._promised = files, promised

    def read(self, share: Share) -> Read:
        return self.join(share, [(range_, self.read_range(range_)) for range_ in share.ranges(RANGE)])

    def read_range(self, range_: Range) -> list[tuple[Window, int]]:
        """Its windows, and the digest of each."""
        with self._files.use(range_.path) as file:
            piece = file.window(range_.start, range_.length, documents=False)
            windows = [_cut(piece, offset, range_.length - range_.offsets[-1]) for offset in range_.offsets]
            return [(window, file.digest_of(window)) for window in windows]

    def join(self, share: Share, ranges: Sequence[tuple[Range, list[tuple[Window, int]]]]) -> Read:
        """What :meth:`read` gives, from what :meth:`read_range` gave."""
        by_place = {place: found for range_, read in ranges for place, found in zip(range_.places, read, strict=True)}
        windows, digests = zip(*(by_place[place] for place in range(len(share))), strict=True)
        check(share, self._promised(share), digests)
        return stack(windows), list(digests)


def check(share: Share, promised: Ints, digests: Sequence[int]) -> None:
    """Raises :class:`DataError` where a window of ``share`` has another digest than was ``promised``."""
    for at in _differing(promised, digests):
        raise DataError(
            f"shard {share.paths[share.path[at]]} has other bytes than when the run was planned: the sequence at token "
            f"{share.start[at]} has crc32 {digests[at]:08x}, had {promised[at]:08x}; restore the shard"
        )


def _differing(promised: Ints, digests: Sequence[int]) -> list[int]:
    """Places of windows that have another digest than was promised."""
    found: list[int] = np.flatnonzero((promised != digests) & (promised >= 0)).tolist()
    return found


def _cut(piece: Window, offset: int, length: int) -> Window:
    """A window of several that follow one another; a window's packed documents end where it does."""
    if len(piece.tokens) == length:
        return piece
    columns = (piece.tokens, piece.labels, piece.position_ids)
    parts = [None if column is None else column[offset : offset + length] for column in columns]
    if piece.sequence_lengths is not None:
        ends: Ints = np.cumsum(piece.sequence_lengths)
        first, last = np.searchsorted(ends, [offset + 1, offset + length])
        parts.append(piece.sequence_lengths[first : last + 1])
    return Window(*parts)  # type: ignore[arg-type]
