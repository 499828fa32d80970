"""What is trained on together: windows of equal length, with what came with their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True)
class Sequences:
    """n windows of L tokens; what no window of them has is None, what some lack is filled in.

    Args:
        tokens: ``[n, L]``.
        labels: ``[n, L]``, see :class:`Window`.
        position_ids: ``[n, L]``.
        sequence_lengths: one array per window.
    """

    tokens: Ints
    labels: Ints | None
    position_ids: Ints | None
    sequence_lengths: list[Ints] | None

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: all but the first of each window and the ignored."""
        n, length = self.tokens.shape
        return n * (length - 1) if self.labels is None else int((self.labels[:, 1:] != IGNORED).sum())


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
