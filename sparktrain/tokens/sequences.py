"""What is trained on together: windows of equal length, with what came with their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

Ints = npt.NDArray[np.int64]

# A label that is no target, as in PyTorch's cross_entropy and Hugging Face's datasets.
IGNORED = -100


@dataclass(frozen=True)
class Window:
    """One window of L tokens as read.

    Args:
        tokens: ``[L]``.
        labels: ``[L]``: the token at its own place (the model shifts), or ``IGNORED``; None: the tokens themselves.
        position_ids: ``[L]``; None: 0 to L-1.
        sequence_lengths: ``[documents]``: tokens of each document packed in the window, which sum to L; None: one.
    """

    tokens: Ints
    labels: Ints | None = None
    position_ids: Ints | None = None
    sequence_lengths: Ints | None = None

    def digest(self) -> int:
        """crc32 of all its numbers as little-endian int64: tokens, and what came with them."""
        found = 0
        for numbers in (self.tokens, self.labels, self.position_ids, self.sequence_lengths):
            if numbers is not None:
                found = crc32(np.ascontiguousarray(numbers, dtype="<i8").data, found)
        return found


@dataclass(frozen=True)
class Sequences:
    """n windows of L tokens; what no window of them has is None, what some lack is filled in.

    Args:
        tokens: ``[n, L]``; as stored where nothing comes with them, else int64.
        labels: ``[n, L]``, see :class:`Window`.
        position_ids: ``[n, L]``.
        sequence_lengths: one array per window.
    """

    tokens: Ints
    labels: Ints | None
    position_ids: Ints | None
    sequence_lengths: list[Ints] | None

    def digests(self) -> list[int]:
        """:meth:`Window.digest` of each."""
        columns = (self.tokens, self.labels, self.position_ids, self.sequence_lengths)
        rows = ([None] * len(self.tokens) if column is None else column for column in columns)
        return [Window(*row).digest() for row in zip(*rows, strict=True)]

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: see :meth:`targets`."""
        n, length = self.tokens.shape
        found = self.targets()
        return n * (length - 1) if found is None else int((found[:, 1:] != IGNORED).sum())

    def targets(self) -> Ints | None:
        """``[n, L]``: the token at its own place where it is predicted, else ``IGNORED``; None: all but the first of
        each window. The first token of a packed document is predicted by nothing of its own."""
        starts = self._starts()
        if starts is None:
            return self.labels
        return np.where(starts, IGNORED, self.tokens if self.labels is None else self.labels)

    def positions(self) -> Ints | None:
        """``[n, L]``: where each token is in its document; None: where it is in its window."""
        starts = self._starts()
        if starts is None or self.position_ids is not None:
            return self.position_ids
        at = np.broadcast_to(np.arange(self.tokens.shape[1]), self.tokens.shape)
        return np.asarray(at - np.maximum.accumulate(np.where(starts, at, 0), axis=1))

    def _starts(self) -> npt.NDArray[np.bool_] | None:
        """``[n, L]``: whether a document begins; None: where windows do."""
        if self.sequence_lengths is not None:
            starts = np.zeros(self.tokens.shape, dtype=np.bool_)
            for row, lengths in zip(starts, self.sequence_lengths, strict=True):
                row[0] = True
                row[np.cumsum(lengths)[:-1]] = True
            return starts
        return None if self.position_ids is None else restarts(self.position_ids)


def restarts(position_ids: Ints) -> npt.NDArray[np.bool_]:
    """``[n, L]``: whether a document begins there, as models tell it: a position that is not the next one."""
    return np.asarray(np.diff(position_ids, axis=1, prepend=position_ids[:, :1]) != 1)


def stack(windows: Sequence[Window]) -> Sequences:
    """``windows`` of equal length, in their order."""
    tokens = np.stack([w.tokens for w in windows])
    length = tokens.shape[1]
    labels = positions = lengths = None
    if any(w.labels is not None for w in windows):
        labels = np.stack([w.tokens if w.labels is None else w.labels for w in windows])
    if any(w.position_ids is not None for w in windows):
        positions = np.stack([np.arange(length) if w.position_ids is None else w.position_ids for w in windows])
    if any(w.sequence_lengths is not None for w in windows):
        lengths = [np.array([length]) if w.sequence_lengths is None else w.sequence_lengths for w in windows]
    return Sequences(tokens, labels, positions, lengths)


def pieces(ends: Ints, start: int, length: int) -> Ints:
    """Lengths of the parts of documents that window [start, start + length) holds, given the documents' ``ends``."""
    inside = ends[np.searchsorted(ends, start, side="right") : np.searchsorted(ends, start + length, side="left")]
    parts = np.diff(np.concatenate([[start], inside, [start + length]]))
    return parts[parts > 0].astype(np.int64)
