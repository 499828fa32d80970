"""This rank's share of every step's batch, read ahead of the loop.

Shapes: B_ = sequences of this rank in a step, L = tokens of a window (S+1 by the default rule).
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

from sparktrain.digests import Digests
from sparktrain.errors import DataError
from sparktrain.plan import PlanSpec, Range, Share
from sparktrain.receipts import Receipt, Receipts
from sparktrain.rundir import RunDir
from sparktrain.tokens import TokenFile, is_bare
from sparktrain.tokens.ahead import read_ahead, read_parts_ahead
from sparktrain.tokens.opened import Opened
from sparktrain.tokens.sequences import Sequences
from sparktrain.tokens.source import Opener
from sparktrain.tokens.sources import is_local, open_if_there
from sparktrain.train.batch import Batch
from sparktrain.train.reading import RANGE, Read, Rows, Windows
from sparktrain.train.shares import Shares

# Batches that are read ahead of the one that is trained on, at least.
_AHEAD = 2
# Ranges of servers and stores that are read at a time.
_CONNECTIONS = 16
# Batches that are read at a time where each may have to fetch a shard.
_FETCHES = 2
_OPEN_FILES = 64
# Windows, and tokens, of steps that are read at once where files are at hand: what is done for each step, and for each
# time that a thread wakes another, is then done for many. Few at first: those may have to be fetched, or disks be slow.
_WINDOWS, _TOKENS = 1 << 10, 1 << 21


class Batches:
    """Iterates ``[B_, L]`` batches, one per step, of rank ``rank`` of ``world``, whose share is by its speed where
    ``weights`` has that of each rank. Tokens come as they are stored, until ``Batch.to``.

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
        self._receipts = receipts
        shards = {shard.path: shard for shard in spec.shards}
        # Where shards come whole, to this machine's disk, it is one of these that is waited for, once.
        self._by_range = not (made or cached or all(map(is_local, shards)))
        self._workers = _FETCHES if cached and not made else 1
        self._files = Opened(lambda path: TokenFile(shards[path], opener), _OPEN_FILES)
        promised = Digests(directory.digests, spec.shards, spec.first_microshards).of
        together = 0
        self._reader: Any
        if made:
            self._reader = _Made(made)
        elif all(map(is_bare, spec.shards)) and len({shard.dtype for shard in spec.shards}) == 1:
            self._reader = Rows(self._files, promised, spec)
            together = 0 if self._by_range else min(_WINDOWS, _TOKENS // spec.window_length)
        else:
            self._reader = Windows(self._files, promised)
        self._shares = Shares(directory.plan, spec, rank, world, first_step, weights, together)

    def __iter__(self) -> Iterator[Batch]:
        read = self._ranges if self._by_range else self._whole
        with closing(self._files), closing(self._shares.read()) as shares, closing(read(shares)) as found:
            for batches in found:
                for batch, receipt in batches:
                    if self._receipts:
                        self._receipts.add(receipt)
                    yield batch

    def _whole(self, shares: Iterator[Share]) -> Generator[list[tuple[Batch, Receipt]], None, None]:
        def read(share: Share) -> list[tuple[Batch, Receipt]] | Iterator[Share]:
            try:
                return _by_step(share, *self._reader.read(share))
            except DataError:
                if share.num_steps == 1:
                    raise
                return share.by_step()

        with closing(read_ahead(shares, read, self._workers, max(_AHEAD, self._workers))) as found:
            for batches in found:
                if isinstance(batches, list):
                    yield batches
                else:  # the error is raised at the turn of the step that it is of
                    yield from map(read, batches)

    def _ranges(self, shares: Iterator[Share]) -> Generator[list[tuple[Batch, Receipt]], None, None]:
        """Range by range, many at a time: a server's answers take long, but it gives them side by side."""

        def read(part: tuple[Share, Range]) -> tuple[Share, Range, Any]:
            return *part, self._reader.read_range(part[1])

        parts = ([(share, range_) for range_ in share.ranges(RANGE)] for share in shares)
        with closing(read_parts_ahead(parts, read, _CONNECTIONS, _AHEAD, _CONNECTIONS)) as found:
            for pieces in found:
                share = pieces[0][0]
                yield _by_step(share, *self._reader.join(share, [piece[1:] for piece in pieces]))


class _Made:
    """Reads what a pipeline makes."""

    def __init__(self, made: Callable[[Share], Sequences]) -> None:
        self._made = made

    def read(self, share: Share) -> Read:
        sequences = self._made(share)
        return sequences, sequences.digests()


def _by_step(share: Share, sequences: Sequences, digests: list[int]) -> list[tuple[Batch, Receipt]]:
    whole, n = Batch.of(sequences), len(share) // share.num_steps
    targets, found = whole.targets_of_rows.numpy(), []
    for i, batch in enumerate(whole.split(n)):
        of = slice(i * n, (i + 1) * n)
        columns = (share.slot[of], share.microshard_id[of], digests[of], targets[of])
        found.append((batch, Receipt(share.step + i, *columns)))
    return found
