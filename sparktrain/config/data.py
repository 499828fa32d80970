"""What a run reads, and in what order."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sparktrain.config.section import Section, WholeNumber


def _several(value: Any) -> Any:
    return (str(value),) if isinstance(value, str | Path) else tuple(value) if isinstance(value, list) else value


def _or_none(value: Any) -> Any:
    """What ``none`` and nothing mean on a command line."""
    return None if value in ("", "none", "None", ("",), ["none"], [None], (None,), ["None"]) else value


Place = Annotated[str, Field(min_length=1)]
Places = Annotated[tuple[Place, ...], BeforeValidator(_several), Field(min_length=1)]


class Skip(Section):
    shard: str = ""
    """File name of a shard: its sequences are in no epoch."""
    sequences: tuple[int, int] | None = None
    """Only its sequences from the first number to before the second; none: all."""
    steps: tuple[int, int] | None = None
    """Instead of a shard: what steps from the first number to before the second would train on, as the entries before
    this one leave the order; later steps get what comes after."""

    @model_validator(mode="after")
    def _is_one_thing(self) -> "Skip":
        if bool(self.shard) == (self.steps is not None) or (self.sequences and not self.shard):
            raise ValueError("an entry of data.skip names a shard, and perhaps its sequences, or steps")
        for name, pair in (("sequences", self.sequences), ("steps", self.steps)):
            if pair and not 0 <= pair[0] < pair[1]:
                raise ValueError(f"data.skip has {name} {list(pair)}: expected [first, last + 1]")
        return self


class Data(Section):
    path: Places = ("data/train",)
    """Directory, file or URI (https://, hf://datasets/, s3://, ...; x-{00..12}.ds is 13 files), or several, with the
    token shards (*.ds, *.bin, *.npy, *.parquet) to train on. Every executor must be able to read it."""
    heldout: Annotated[Places | None, BeforeValidator(_or_none)] = None
    """The same with shards to measure the held-out loss on, before and after training."""
    mirrors: tuple[str, ...] = ()
    """Roots that hold the same files, such as https://a.org/data and https://b.org/data: what is under one of them is
    read from another one where it fails."""
    cache_dir: Path | None = None
    """Keep shards of elsewhere in this directory of every executor's own disk, verified by sha256; none: read parts
    as they are needed."""
    cache_bytes: int = Field(64 << 30, ge=1)
    """The most that data.cache_dir may hold."""
    heldout_sequences: int = Field(256, ge=1)
    """At most so many held-out sequences are measured: evenly spaced, the same for any number of ranks."""
    sequence_length: int = Field(1024, ge=2)
    """S, tokens from one sequence to the next."""
    window: Literal["overlap1", "psyche"] = "overlap1"
    """overlap1: S+1 tokens are read and S predicted, so that no boundary token is lost; psyche: S tokens are read and
    S-1 predicted, as Psyche cuts the same file."""
    order: Literal["shuffle", "sequential", "psyche"] = "shuffle"
    """shuffle: another order in every epoch; sequential: as in the shards; psyche: Psyche's shuffle number for number,
    the same in every epoch."""
    block: int = Field(1, ge=1, le=2**20)
    """Shuffle blocks of so many sequences that follow one another in their shard: as many fewer ranges to read from
    remote storage, and batches that are less of a mixture."""
    psyche_seed: str = Field("", pattern="^([0-9a-fA-F]{64})?$")
    """Psyche's shuffle_seed, 32 bytes in hexadecimal; none: what its --seed makes of run.seed."""
    skip: tuple[Skip, ...] = ()
    """Data that is not trained on."""
    token_size: Annotated[Literal[2, 4] | None, WholeNumber] = None
    """Bytes per token of files that do not say it (raw .bin and .npy, .ds without .metadata); none: 2."""
