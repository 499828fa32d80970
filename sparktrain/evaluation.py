"""The loss of a trained model on a split: what is asked, which sequences that is, and what is found.

Micro-batches are numbered through the split, and who shares the work takes some of them whole, so every forward pass
is the same for any number of processes; their losses are added up as fractions, which is exact in any order. So one
process and a hundred find the same number, to the bit.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from sparktrain.config import Data, Section
from sparktrain.config.data import Places
from sparktrain.config.place import Place
from sparktrain.config.section import WholeNumber
from sparktrain.errors import DataError
from sparktrain.plan import count_microshards, slots_of, windows_at
from sparktrain.plan.shuffle import permute, round_keys
from sparktrain.tokens.shard import Shard


class Evaluate(Section):
    """Measure the loss of a run, a checkpoint or a model directory on a split."""

    model: Place
    """Run directory (of a run that is not finished: its newest checkpoint), checkpoint, or Hugging Face directory."""
    data: Places | None = None
    """The split: directory, file or URI with token shards, or several, as a run's data.path; none: the data.heldout of
    the run that the model comes from."""
    sequence_length: int = Field(0, ge=0)
    """S, tokens from one sequence to the next; 0: the run's, else the model's positions, but 1024 at most."""
    window: Literal["overlap1", "psyche"] | None = None
    """How shards are cut, as a run's data.window; none: the run's, else overlap1."""
    token_size: Annotated[Literal[2, 4] | None, WholeNumber] = None
    """Bytes per token of files that do not say it; none: the run's, else 2."""
    sequences: int = Field(0, ge=0)
    """Measure so many sequences, drawn by the seed, none of them twice; 0: all."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of that draw."""
    micro_batch: int = Field(8, ge=1)
    """Sequences per forward pass."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Run the forward pass in this type while parameters keep theirs."""
    ranks: int = Field(0, ge=0)
    """Processes that share the work, a Spark task each; 0: one per slot of the cluster. The result is the same."""


class Work(Section):
    """What every process is told, through the door, as JSON: all that is measured, and which of ``world`` it is."""

    model: Place
    data: Data
    shards: tuple[Shard, ...]
    sequences: int
    seed: int
    micro_batch: int
    autocast: Literal["none", "bfloat16"]
    world: int
    rank: int = 0

    @property
    def places(self) -> tuple[str, ...]:
        """Where the split is."""
        return self.data.path or ()

    @property
    def num_sequences(self) -> int:
        """Of the whole split."""
        return sum(count_microshards(shard, self.data.sequence_length) for shard in self.shards)

    @property
    def num_measured(self) -> int:
        return min(self.sequences or self.num_sequences, self.num_sequences)

    def share(self) -> list[tuple[Shard, int]]:
        """(shard, first token) of each window of this process, in the order of the shards; whole micro-batches, but for
        the last one of the split."""
        total, measured = self.num_sequences, self.num_measured
        first, last = slots_of(self.rank, self.world, -(-measured // self.micro_batch))
        first, last = first * self.micro_batch, min(last * self.micro_batch, measured)
        if measured == total:
            return windows_at(self.shards, self.data.sequence_length, np.arange(first, last))
        drawn = np.sort(permute(np.arange(measured, dtype=np.int64), total, round_keys(self.seed, 0)))
        return windows_at(self.shards, self.data.sequence_length, drawn[first:last])


class Share(Section):
    """What a process found: the sum of its losses in nats, as a fraction ``a/b``, and over how many tokens."""

    loss_sum: str
    targets: int


@dataclass(frozen=True)
class Evaluation:
    """``loss``: nats per token over ``tokens`` predicted tokens of ``sequences`` sequences, of ``of`` in the split."""

    model: str
    data: tuple[str, ...]
    sequence_length: int
    sequences: int
    of: int
    tokens: int
    loss: float

    @classmethod
    def add_up(cls, work: Work, shares: Iterable[Share]) -> "Evaluation":
        """Raises :class:`DataError` where there was nothing to predict."""
        found = list(shares)
        tokens = sum(share.targets for share in found)
        if not tokens:
            raise DataError(f"{work.places[0]} has no target, its labels leave all tokens out: use other data")
        loss = float(sum(Fraction(share.loss_sum) for share in found) / tokens)
        return cls(
            model=str(work.model),
            data=work.places,
            sequence_length=work.data.sequence_length,
            sequences=work.num_measured,
            of=work.num_sequences,
            tokens=tokens,
            loss=loss,
        )

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def report(self) -> str:
        """All of it, for people."""
        return (
            f"loss          {self.loss:.6f} nats per token\n"
            f"perplexity    {self.perplexity:,.4f}\n"
            f"tokens        {self.tokens:,} in {self.sequences:,} of {self.of:,} sequences of {self.sequence_length}\n"
            f"data          {', '.join(self.data)}\n"
            f"model         {self.model}"
        )
