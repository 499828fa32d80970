"""What one forward pass reads: tokens, which of them are targets, and where each is in its document.

Shapes: n = sequences, L = tokens of a window, S = L - 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sparktrain.errors import ModelError
from sparktrain.tokens.sequences import IGNORED, Sequences


@dataclass(frozen=True)
class Batch:
    """``labels``: the token at its own place, or ``IGNORED``; None: every token but each row's first is a target.
    ``position_ids``: where one is not the next after the one before it, a document begins, which is attended to alone;
    None: a row is one. All ``[n, L]`` int64, but tokens may be of the type that they are stored in until :meth:`to`."""

    tokens: torch.Tensor
    labels: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    @classmethod
    def of(cls, sequences: Sequences) -> "Batch":
        """``sequences`` as tensors."""
        labels, positions = sequences.targets(), sequences.positions()
        return cls(
            torch.from_numpy(sequences.tokens),
            None if labels is None else torch.from_numpy(labels),
            None if positions is None else torch.from_numpy(positions),
        )

    @property
    def num_targets(self) -> int:
        return int(self.targets_of_rows.sum())

    @property
    def targets_of_rows(self) -> torch.Tensor:
        """``[n]`` int64."""
        if self.labels is None:
            return torch.full((self.tokens.shape[0],), self.tokens.shape[1] - 1)
        return (self.labels[:, 1:] != IGNORED).sum(1)

    def arrays(self) -> "dict[str, np.ndarray[Any, Any]]":
        """What there is of it, by name."""
        named = zip(("tokens", "labels", "position_ids"), self._parts(), strict=True)
        return {name: part.long().numpy() for name, part in named if part is not None}

    def to(self, device: torch.device) -> "Batch":
        """On ``device``, in int64: on the way a token has the bytes that it is stored in."""
        return Batch(*(None if t is None else t.to(device).long() for t in self._parts()))  # type: ignore[arg-type]

    def split(self, n: int) -> Iterator["Batch"]:
        """Parts of ``n`` rows, the last perhaps of fewer."""
        parts = (repeat(None) if t is None else torch.split(t, n) for t in self._parts())
        return (Batch(*part) for part in zip(*parts, strict=False))

    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.tokens, self.labels, self.position_ids


def logits(model: PreTrainedModel, tokens_nS: torch.Tensor, position_ids_nS: torch.Tensor | None) -> torch.Tensor:
    """``[n, S, V]``. transformers keeps documents apart by their position ids, in its own masks (sliding windows stay)
    or, with flash attention, by cutting a single row at them."""
    if position_ids_nS is None:
        found: torch.Tensor = model(input_ids=tokens_nS).logits
        return found
    if not str(model.config._attn_implementation).startswith("flash"):
        found = model(input_ids=tokens_nS, position_ids=position_ids_nS).logits
        return found
    found = model(input_ids=tokens_nS.reshape(1, -1), position_ids=position_ids_nS.reshape(1, -1)).logits
    return found.reshape(*tokens_nS.shape, -1)


@torch.no_grad()
def check_separates(model: PreTrainedModel) -> None:
    """Raises :class:`ModelError` where a packed document is not independent of the one before it: models without
    attention, or with code of their own, may not heed position ids. Two forward passes of 16 tokens."""
    ids = torch.arange(16, device=model.device).unsqueeze(0) % model.config.vocab_size
    other = torch.where(torch.arange(16, device=model.device) < 8, ids.flip(1), ids)
    positions = torch.arange(16, device=model.device).unsqueeze(0) % 8
    was = model.training
    model.eval()  # type: ignore[no-untyped-call]
    try:
        a, b = (logits(model, tokens, positions)[:, 8:].float() for tokens in (ids, other))
        apart = bool(torch.allclose(a, b, rtol=0, atol=1e-3 * float(a.abs().max())))
    except TypeError:  # it takes no position ids
        apart = False
    model.train(was)
    if not apart:
        raise ModelError(
            f"a {model.config.model_type} model cannot keep packed documents apart: use another architecture, or data "
            "without sequence_lengths and position_ids"
        )
