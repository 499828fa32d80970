"""Where the bytes of a shard are: one file per kind of source under ``sources/``, and this, what they have in common.

A format (``ds.py``, ...) is handed an :data:`Opener` and never opens a file itself, so every format works everywhere.
"""

from collections.abc import Callable
from typing import Protocol


class Source(Protocol):
    """One readable object at ``uri``: a file, an object of a store, a URL. Safe to read from several threads."""

    uri: str

    @property
    def descriptor(self) -> int | None:
        """An open file of this machine that begins with the same bytes, unless it decayed; None: there is none."""

    def size(self) -> int:
        """Bytes."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly bytes [offset, offset + length). Raises :class:`sparktrain.errors.DataError`, naming the URI, what
        was expected and what was found, where it cannot."""

    def close(self) -> None:
        """Let go of it."""


Opener = Callable[[str], Source | None]
"""The source at a URI; None where there is nothing. Raises :class:`sparktrain.errors.DataError` where it is there but
cannot be read."""

Lister = Callable[[str], list[str] | None]
"""The files directly in the directory at a URI, by URI and in no order; None where there is no directory. Raises
:class:`sparktrain.errors.DataError` where it cannot be listed."""
