"""What is known of a file of tokens without reading it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """A file of tokens.

    Args:
        path: absolute path.
        num_tokens: tokens in the file.
        token_size: bytes per token, 2 or 4, little-endian unsigned.
    """

    path: str
    num_tokens: int
    token_size: int
