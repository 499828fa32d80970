"""Tokens and nothing else: ``.bin``, and ``.npy`` without NumPy's header, as nanotron's Nanoset and Psyche read them.

The file says nothing of itself: 2 bytes per token, little-endian and unsigned, unless ``data.token_size`` says 4.
"""

from sparktrain.tokens.shard import Shard
from sparktrain.tokens.source import Opener, Source


def inspect(source: Source, open_if_there: Opener, token_size: int | None) -> Shard | None:
    """The shard that ``source`` is."""
    size = token_size or 2
    return Shard(source.uri, source.size() // size, size, "raw")
