"""Token shards: one file per format and a table of them. A shard is a file of tokens; all formats read alike.

A format module has ``inspect(path) -> Shard`` (cheap: no token is read) and names its suffix in ``FORMATS``.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparktrain.errors import DataError
from sparktrain.tokens import ds
from sparktrain.tokens.shard import Shard

__all__ = ["FORMATS", "Shard", "TokenFile", "find_shards", "inspect", "read_windows"]

FORMATS: dict[str, Callable[[str], Shard]] = {
    ".ds": ds.inspect,
}


def find_shards(directory: Path) -> list[str]:
    """Absolute paths of the shards in ``directory``, sorted, so that every machine numbers them alike."""
    if not directory.is_dir():
        raise DataError(f"data directory {directory} does not exist: give a directory with {_suffixes()} shards")
    paths = sorted(str(p.resolve()) for p in directory.iterdir() if p.suffix in FORMATS)
    if not paths:
        raise DataError(f"data directory {directory} holds no {_suffixes()} shards: make some with jobs/tokenize.py")
    return paths


def inspect(path: str) -> Shard:
    """What ``path`` holds, judged by its suffix. Raises :class:`DataError` for a file that cannot be a shard."""
    return FORMATS[Path(path).suffix](path)


class TokenFile:
    """An open shard. Reads with ``pread``: a file truncated under us is an error, where a memory map is a SIGBUS."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        try:
            self._fd = os.open(shard.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"shard {shard.path} cannot be read: {error.strerror}") from error

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """Tokens [start, start + length), as int64 ``[length]``."""
        size = self.shard.token_size
        raw = os.pread(self._fd, length * size, start * size)
        if len(raw) != length * size:
            raise DataError(
                f"shard {self.shard.path} ends at byte {start * size + len(raw)}, expected at least "
                f"{(start + length) * size}: it was truncated after the plan was made; restore it"
            )
        return np.frombuffer(raw, dtype=f"<u{size}").astype(np.int64)

    def close(self) -> None:
        os.close(self._fd)


def read_windows(windows: list[tuple[TokenFile, int]], sequence_length: int) -> npt.NDArray[np.int64]:
    """``[len(windows), S+1]`` tokens of the windows that start at the given token of the given files."""
    out = np.empty((len(windows), sequence_length + 1), dtype=np.int64)
    for i, (file, start) in enumerate(windows):
        out[i] = file.read(start, sequence_length + 1)
    return out


def _suffixes() -> str:
    return "/".join(f"*{suffix}" for suffix in FORMATS)
