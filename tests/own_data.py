"""What users' pipelines may name: datasets, generators and functions of a lease, good and bad."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

COUNT, VOCAB = 50, 512


def walk(rng: np.random.Generator, length: int) -> Any:
    """A random walk over the vocabulary: learnable in a few steps."""
    return np.cumsum(rng.integers(0, 3, length)) % VOCAB


class Plain:
    def __init__(self, count: int = COUNT, length: int = 33) -> None:
        self.rows = np.stack([walk(np.random.default_rng(i), length) for i in range(count)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i].tolist()


class Masked(Plain):
    """The first half of each is no target; as PyTorch's tensors."""

    mask = (np.arange(33) > 16).astype(int)

    def __getitem__(self, i: int) -> Any:
        return {"input_ids": torch.from_numpy(self.rows[i]), "loss_mask": torch.from_numpy(self.mask), "id": i}


class Labelled(Plain):
    def __getitems__(self, numbers: list[int]) -> list[Any]:
        labels = np.where(Masked.mask == 1, self.rows, -100)
        return [{"input_ids": self.rows[i], "labels": labels[i]} for i in numbers]


class Packed(Plain):
    def __getitem__(self, i: int) -> Any:
        return {"input_ids": self.rows[i], "sequence_lengths": [20, 13]}


plain = Plain()


def generate(rng: np.random.Generator, length: int, vocab_size: int, start: int = 0) -> Any:
    return (walk(rng, length) + start) % vocab_size


def micro_epoch(lease: dict[str, Any]) -> Iterator[Any]:
    lease["payload"]["used"] = True  # its own copy
    for number in lease["microshard_ids"]:
        yield (walk(np.random.default_rng(number), lease["window_length"]) + lease["payload"]["start"]) % VOCAB


class Wrong(Plain):
    """Items that are wrong in one way, from number ``first`` on."""

    def __init__(self, kind: str, first: int = 0) -> None:
        super().__init__()
        self.kind, self.first = kind, first

    def __getitem__(self, i: int) -> Any:
        tokens = self.rows[i].copy()
        if i < self.first:
            return tokens
        if self.kind == "id":
            tokens[7] = 600
        elif self.kind == "raises":
            raise KeyError("shelf 7")
        return {
            "short": tokens[1:],
            "floats": tokens / 2,
            "pair": (tokens, tokens),
            "mapping": {"text": "hello"},
            "columns": {"input_ids": tokens, "labels": tokens},
            "mask": {"input_ids": tokens, "loss_mask": tokens},
            "padding": {"input_ids": tokens, "attention_mask": Masked.mask},
            "lengths": {"input_ids": tokens, "sequence_lengths": [20, 20]},
        }.get(self.kind, tokens)


class Empty(Plain):
    def __len__(self) -> int:
        return 0


def stream() -> Iterator[int]:
    return iter(())


def too_few(lease: dict[str, Any]) -> list[Any]:
    return []
