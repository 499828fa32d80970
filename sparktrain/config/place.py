"""A setting that is a directory of this machine or of an object store."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainSerializer, SerializationInfo, WrapValidator


def _parsed(value: Any, parse: Callable[[Any], Path]) -> Path:
    if isinstance(value, Path) or (isinstance(value, str) and "://" not in value):
        return parse(value)
    from sparktrain.storage import place  # only who names one needs it

    return place(value)


def _said(value: Path, info: SerializationInfo) -> Any:
    return str(value) if info.mode == "json" else value


Place = Annotated[Path, WrapValidator(_parsed), PlainSerializer(_said)]
