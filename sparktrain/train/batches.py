"""This rank's share of every step's batch, read ahead of the loop.

Shapes: B_ = sequences of this rank in a step, L = tokens of a window (S+1 by the default rule).
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pyarrow.dataset as pads

from sparktrain.digests import Digests
from sparktrain.errors import DataError
from sparktrain.plan import Assignment, PlanSpec, Range, Share, rows, runs_of_steps, slots_of
from sparktrain.receipts import Receipt, Receipts
from sparktrain.rundir import RunDir
from sparktrain.storage import dataset
from sparktrain.tokens import TokenFile
from sparktrain.tokens.ahead import read_ahead, read_parts_ahead
from sparktrain.tokens.opened import Opened
from sparktrain.tokens.sequences import Sequences, Window, stack
from sparktrain.tokens.source import Opener
from sparktrain.tokens.sources import is_local, open_if_there
from sparktrain.train.batch import Batch

# Rows that are taken from the plan's Parquet files at a time: a row group of these is decoded whole each time.
_PLAN_ROWS = 1 << 16
# Batches that are read ahead of the one that is trained on, at least.
_AHEAD = 2
# Ranges of servers and stores that are read at a time, and the tokens of one.
_CONNECTIONS = 16
_RANGE = 1 << 21
# Batches that are read at a time where each may have to fetch a shard.
_FETCHES = 2
_OPEN_FILES = 64


class _Piece(NamedTuple):
    """Windows of a shard by their places in the share: as stored, with the type of their tokens; or with what comes
    along. And the digest of each."""

    places: list[int]
    windows: Sequence[bytes | memoryview | Window]
    dtype: np.dtype[Any] | None
    digests: list[int]


class Batches:
    """Iterates ``[B_, L]`` batches, one per step, of rank ``rank`` of ``world``, whose share is by its speed where
    ``weights`` has that of each rank.

    Rows come from the plan on disk. Those of the first step are recomputed and compared: a plan of another run, or
    one edited by hand, is a :class:`DataError` before a token is trained on. So is a window
    whose digest is not that with which it was planned, when it is read. Each batch that is handed out is entered in
    ``receipts``.

    ``cached``: ``opener`` brings shards of elsewhere to this machine's disk, whole. ``made`` makes the sequences of a
    share where they are not in shards (``pipelines/``).
    """

    def __init__(
        self,
        directory: RunDir,
        spec: PlanSpec,
        rank: int,
        world: int,
        first_step: int = 0,
        weights: Sequence[float] = (),
        opener: Opener = open_if_there,
        receipts: Receipts | None = None,
        cached: bool = False,
        made: Callable[[Share], Sequences] | None = None,
    ) -> None:
        # As a dictionary, a path of each row costs a number and not a string.
        format_ = pads.ParquetFileFormat(dictionary_columns={"path"})
        self._plan = pads.dataset(**dataset(directory.plan), format=format_, exclude_invalid_files=False)
        self._spec, self._first_step = spec, first_step
        self._rank, self._world, self._weights, self._receipts = rank, world, weights, receipts
        shards = {shard.path: shard for shard in spec.shards}
        # Where shards come whole, to this machine's disk, it is one of these that is waited for, once.
        self._remote = not (made or cached or all(map(is_local, shards)))
        self._workers = _FETCHES if cached and not made else 1
        self._digests = Digests(directory.digests, spec.shards, spec.first_microshards)
        self._made = made
        self._files = Opened(lambda path: TokenFile(shards[path], opener), _OPEN_FILES)

    def __iter__(self) -> Iterator[Batch]:
        with closing(self._files), closing(self._by_range() if self._remote else self._by_batch()) as batches:
            for batch, read in batches:
                if self._receipts:
                    self._receipts.add(read)
                yield batch

    def _by_batch(self) -> Generator[tuple[Batch, list[Receipt]], None, None]:
        with closing(self._shares()) as shares:
            yield from read_ahead(shares, self._batch, self._workers, max(_AHEAD, self._workers))

    def _by_range(self) -> Generator[tuple[Batch, list[Receipt]], None, None]:
        """Range by range, many at a time: a server's answers take long, but it gives them side by side."""
        with closing(self._shares()) as shares:
            ranges = ([(share, range_) for range_ in share.ranges(_RANGE)] for share in shares)
            with closing(read_parts_ahead(ranges, self._range, _CONNECTIONS, _AHEAD, _CONNECTIONS)) as found:
                for pieces in found:
                    yield _together(pieces[0][0], [piece for _, piece in pieces])

    def _batch(self, share: Share) -> tuple[Batch, list[Receipt]]:
        if self._made:
            sequences = self._made(share)
            return _receipted(share, sequences, sequences.digests())
        pieces = []
        for path, ranges in groupby(share.ranges(_RANGE), key=attrgetter("path")):
            with self._files.use(path) as file:
                pieces.append(self._read(file, share, list(ranges)))
        return _together(share, pieces)

    def _range(self, part: tuple[Share, Range]) -> tuple[Share, _Piece]:
        share, range_ = part
        with self._files.use(range_.path) as file:
            return share, self._read(file, share, [range_])

    def _read(self, file: TokenFile, share: Share, ranges: Sequence[Range]) -> _Piece:
        """``ranges``, all of ``file``."""
        piece = _read_bare(file, ranges) if file.bare else _read(file, ranges)
        self._digests.check(ranges[0].path, share.microshard_id[piece.places], piece.digests)
        return piece

    # -- the plan ------------------------------------------------------------------------------------------------

    def _shares(self) -> Generator[Share, None, None]:
        """This rank's rows of each step. The plan is read ahead, too."""
        most = max(stretch.batch for stretch in self._spec.stretches)
        steps = runs_of_steps(self._spec.stretches, self._first_step, self._spec.steps, max(1, _PLAN_ROWS // most))
        with closing(read_ahead(steps, self._rows_of, 1, 1)) as found:
            for shares in found:
                yield from shares

    def _rows_of(self, run: tuple[int, int, int]) -> list[Share]:
        begin, end, batch = run
        first_slot, last_slot = slots_of(self._rank, self._world, batch, self._weights)
        step, slot, length = pads.field("step"), pads.field("slot"), self._spec.window_length
        here = (step >= begin) & (step < end) & (slot >= first_slot) & (slot < last_slot)
        table = self._plan.to_table(
            columns=list(Assignment._fields), filter=here & (pads.field("length") == length)
        ).sort_by("pos")
        share = last_slot - first_slot
        if table.num_rows != share * (end - begin):
            raise DataError(
                f"the plan holds {table.num_rows} rows for steps {begin} to {end - 1} of this rank, "
                f"expected {share * (end - begin)}: the plan is damaged; remove the run directory and start again"
            )
        paths = table.column("path").unify_dictionaries().combine_chunks()
        names = ("slot", "pos", "epoch", "microshard_id", "start")
        columns = {name: table.column(name).to_numpy().astype(np.int64) for name in names}
        columns["path"] = paths.indices.to_numpy().astype(np.int64)
        shards, shares = paths.dictionary.to_pylist(), []
        for i in range(end - begin):
            mine = {name: column[i * share : (i + 1) * share] for name, column in columns.items()}
            shares.append(Share(begin + i, **mine, paths=shards, window_length=length))
        if begin == self._first_step:
            self._compare(shares[0].rows(), first_slot)
        return shares

    def _compare(self, found: list[Assignment], first_slot: int) -> None:
        first = self._spec.first_position(self._first_step) + first_slot
        promised = rows(self._spec, first, first + len(found))
        for row, expected in zip(found, promised, strict=True):
            if row != expected:
                raise DataError(f"plan row {row} is not what the run's seed gives, {expected}: the plan was changed")


def _read(file: TokenFile, ranges: Sequence[Range]) -> _Piece:
    places, windows = [], []
    for _, start, whole, here, offsets in ranges:
        piece = file.window(start, whole, documents=False)
        places += here
        windows += [_cut(piece, offset, whole - offsets[-1]) for offset in offsets]
    return _Piece(places, windows, None, [window.digest() for window in windows])


def _read_bare(file: TokenFile, ranges: Sequence[Range]) -> _Piece:
    places: list[int] = []
    windows: list[bytes | memoryview] = []
    dtype, stored = file.dtype, file.stored
    size = dtype.itemsize
    for _, start, whole, here, offsets in ranges:
        places += here
        raw = stored(start, whole)
        if len(here) == 1:
            windows.append(raw)
            continue
        view, length = memoryview(raw), (whole - offsets[-1]) * size
        windows += [view[offset * size : offset * size + length] for offset in offsets]
    return _Piece(places, windows, dtype, list(map(crc32, windows)))


def _together(share: Share, pieces: list[_Piece]) -> tuple[Batch, list[Receipt]]:
    digests = np.empty(len(share), dtype=np.int64)
    for piece in pieces:
        digests[piece.places] = piece.digests
    return _receipted(share, _sequences(pieces), digests.tolist())


def _receipted(share: Share, sequences: Sequences, digests: list[int]) -> tuple[Batch, list[Receipt]]:
    batch = Batch.of(sequences)
    columns = (share.slot.tolist(), share.microshard_id.tolist(), digests, batch.targets_of_rows.tolist())
    return batch, [(share.step, *row) for row in zip(*columns, strict=True)]


def _sequences(pieces: list[_Piece]) -> Sequences:
    """The windows in the order of their places."""
    dtypes, count = {piece.dtype for piece in pieces}, sum(len(piece.places) for piece in pieces)
    ordered: list[Any] = [None] * count
    for places, windows, dtype, _ in pieces:
        for place, window in zip(places, windows, strict=True):
            ordered[place] = window
            if len(dtypes) > 1 and not isinstance(window, Window):
                ordered[place] = Window(np.frombuffer(window, dtype=dtype).astype(np.int64))
    if len(dtypes) > 1 or None in dtypes:
        return stack(ordered)
    # Tokens and nothing else: all are widened at once.
    tokens = np.frombuffer(b"".join(ordered), dtype=dtypes.pop()).reshape(count, -1)
    return Sequences(tokens.astype(np.int64), None, None, None)


def _cut(piece: Window, offset: int, length: int) -> Window:
    """A window of several that follow one another; a window's packed documents end where it does."""
    if len(piece.tokens) == length:
        return piece
    columns = (piece.tokens, piece.labels, piece.position_ids)
    parts = [None if column is None else column[offset : offset + length] for column in columns]
    if piece.sequence_lengths is not None:
        ends = np.cumsum(piece.sequence_lengths)
        first, last = np.searchsorted(ends, [offset + 1, offset + length])
        parts.append(piece.sequence_lengths[first : last + 1])
    return Window(*parts)  # type: ignore[arg-type]
