"""Token shards: one file per format and a table of them. A shard is a file of tokens; all formats read alike.

A format module has ``inspect(source, open_if_there) -> Shard`` (cheap: no token is read), which is one row of
``FORMATS``; ``open_if_there`` finds side files. Where the bytes are is ``sources/``.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparktrain.errors import DataError
from sparktrain.tokens import ds, sources
from sparktrain.tokens.shard import Shard
from sparktrain.tokens.source import Opener, Source
from sparktrain.tokens.sources import open_if_there, open_source

__all__ = ["FORMATS", "Shard", "TokenFile", "find_shards", "inspect", "read_windows"]

FORMATS: dict[str, Callable[[Source, Opener], Shard]] = {
    ".ds": ds.inspect,
}


def find_shards(where: Path | str | Sequence[str]) -> list[str]:
    """URIs of the shards at ``where``, absolute paths where they are local; sorted, so that every machine numbers them
    alike. ``where`` is a place that :func:`sparktrain.tokens.sources.find` knows, or several."""
    places = [str(where)] if isinstance(where, str | Path) else where
    found = sorted(uri for place in places for uri in sources.find(place, FORMATS))
    twice = next((a for a, b in pairwise(found) if a == b), None)
    if twice:
        raise DataError(f"shard {twice} is in the data twice: name it once")
    return found


def inspect(path: str) -> Shard:
    """What ``path`` holds, judged by its suffix. Raises :class:`DataError` for a file that cannot be a shard."""
    source = open_source(path)
    shard = FORMATS[Path(path).suffix](source, open_if_there)
    source.close()
    return shard


class TokenFile:
    """An open shard."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._source = open_source(shard.path)

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length), as int64 ``[length]``."""
        size = self.shard.token_size
        raw = self._source.read(start * size, length * size)
        return np.frombuffer(raw, dtype=f"<u{size}").astype(np.int64)

    def close(self) -> None:
        self._source.close()


def read_windows(windows: list[tuple[TokenFile, int]], sequence_length: int) -> npt.NDArray[np.int64]:
    """``[len(windows), S+1]`` tokens of the windows that start at the given token of the given files."""
    out = np.empty((len(windows), sequence_length + 1), dtype=np.int64)
    for i, (file, start) in enumerate(windows):
        out[i] = file.read(start, sequence_length + 1)
    return out
