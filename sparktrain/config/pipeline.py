"""Where sequences come from."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sparktrain.config.section import Section


def _read(value: Any) -> Any:
    """What text says that is JSON, as a command line gives it."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


class Pipeline(Section):
    pipeline: Literal["sharded", "indexed", "generated", "micro-epoch"] = "sharded"
    """Where sequences come from. sharded: token shards at data.path; indexed: a map-style dataset, data.dataset, whose
    items are token ids; generated: a function, data.dataset, of a random number generator; micro-epoch: a function,
    data.dataset, of a lease and data.payload."""
    dataset: str = ""
    """Python object of your own for the other pipelines, as MODULE:ATTRIBUTE, importable by every executor. generated
    makes random tokens without one."""
    arguments: dict[str, Any] = {}
    """What data.dataset is called with."""
    sequences: int | None = Field(None, ge=1, le=2**40)
    """generated, micro-epoch: sequences of an epoch; none: so many that none comes twice."""
    payload: Annotated[Any, BeforeValidator(_read)] = None
    """micro-epoch: any JSON, handed to data.dataset with each lease."""

    @model_validator(mode="after")
    def _names_what_it_needs(self) -> "Pipeline":
        kind, name = self.pipeline, self.dataset
        if name and not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", name):
            raise ValueError(f"data.dataset is {name!r}: expected MODULE:ATTRIBUTE, as my_package.data:Dataset")
        if kind in ("indexed", "micro-epoch") and not name:
            raise ValueError(f"data.pipeline is {kind}, which needs data.dataset: give MODULE:ATTRIBUTE")
        allowed = {
            "dataset": kind != "sharded",
            "arguments": kind != "sharded",
            "sequences": kind in ("generated", "micro-epoch"),
            "payload": kind == "micro-epoch",
        }
        for setting, used in allowed.items():
            if not used and getattr(self, setting) not in ("", {}, None):
                raise ValueError(f"data.{setting} is set, but data.pipeline {kind} does not use it: leave it out")
        return self
