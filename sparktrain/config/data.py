"""What a run reads, and in what order."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sparktrain.config.pipeline import Pipeline
from sparktrain.config.section import Section, WholeNumber


def _several(value: Any) -> Any:
    return (str(value),) if isinstance(value, str | Path) else tuple(value) if isinstance(value, list) else value


def _or_none(value: Any) -> Any:
    """What ``none`` and nothing mean on a command line."""
    return None if value in ("", "none", "None", ("",), ["none"], [None], (None,), ["None"]) else value


def _default(value: Any) -> Any:
    """The same, but nothing is a place that is missing."""
    return value if value in ("", ("",)) else _or_none(value)


# Each has at least one place in a round of a mixture's order, which has 16,384.
_MOST_SOURCES = 1000

Place = Annotated[str, Field(min_length=1)]
Places = Annotated[tuple[Place, ...], BeforeValidator(_several), Field(min_length=1)]


class Skip(Section):
    shard: str = ""
    """File name of a shard, with more of its path where several have it: its sequences are in no epoch."""
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


class DataSource(Section):
    name: str = Field(pattern=r"^\S(.*\S)?$")
    """What reports and metrics call it."""
    path: Places
    """As data.path."""
    weight: float | None = None
    """How many of all sequences come from it, against the other sources' weights; none for all sources: as many as it
    has, so that each sequence comes as often as any other; 0: it is not read."""


class Data(Pipeline):
    path: Annotated[Places | None, BeforeValidator(_default)] = None
    """Directory, file or URI (https://, hf://datasets/, s3://, ...; x-{00..12}.ds is 13 files), or several, with the
    token shards (*.ds, *.bin, *.npy, *.parquet) to train on; none: data/train, or data.sources. Every executor must be
    able to read it."""
    sources: tuple[DataSource, ...] = ()
    """Instead of data.path several sources that are mixed by weight: name, path and weight of each."""
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

    @model_validator(mode="after")
    def _sources_can_be_told_apart(self) -> "Data":
        names = [source.name for source in self.sources]
        if names and self.pipeline != "sharded":
            raise ValueError(f"data.sources are token shards, but data.pipeline is {self.pipeline}: leave one out")
        if names and self.path is not None:
            raise ValueError(
                "data.path and data.sources are both given: leave one out, over a file's by --data.path none or "
                "--data.sources []"
            )
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise ValueError(f"data.sources has two sources named {twice[0]}: give each a name of its own")
        if len(names) > _MOST_SOURCES:
            raise ValueError(f"data.sources are {len(names):,}, at most {_MOST_SOURCES:,} can be mixed: join some")
        return self

    @model_validator(mode="after")
    def _sources_can_be_weighed(self) -> "Data":
        weights = {source.name: source.weight for source in self.sources}
        given = {name: weight for name, weight in weights.items() if weight is not None}
        if given and (without := [name for name in weights if name not in given]):
            raise ValueError(
                f"data.sources {without[0]} has no weight, {next(iter(given))} has one: give every source a weight, or "
                "none to mix them by length"
            )
        for name, weight in given.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"data.sources {name} has weight {weight}: expected a number from 0 on")
        if given and not any(given.values()):
            raise ValueError("data.sources have weight 0, all of them: give one of them a weight above 0")
        return self

    @property
    def mixed(self) -> tuple[DataSource, ...]:
        """The sources that are trained on."""
        return tuple(source for source in self.sources if source.weight != 0)

    @property
    def trained_on(self) -> dict[str, tuple[str, ...]]:
        """Shards that are trained on, by the setting that says it: ``data.path``, or each source in its order; none
        where sequences are not in shards."""
        if self.pipeline != "sharded":
            return {}
        if self.sources:
            return {f"data.sources {source.name}": source.path for source in self.mixed}
        return {"data.path": self.path or ("data/train",)}

    def placed(self, absolute: Callable[[str], str]) -> dict[str, Any]:
        """The settings that name places, with each of them as ``absolute`` has it."""
        named = {"path": self.trained_on.get("data.path"), "heldout": self.heldout, "mirrors": self.mirrors}
        found: dict[str, Any] = {name: [absolute(p) for p in places] for name, places in named.items() if places}
        if self.sources:
            found["sources"] = [
                {**source.model_dump(), "path": [absolute(p) for p in source.path]} for source in self.sources
            ]
        return found
