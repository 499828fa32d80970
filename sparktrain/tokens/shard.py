"""What is known of a file of tokens without reading them."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shard:
    """A file of tokens: plain values, written into the plan.

    A **stream** is one run of tokens, cut into windows by the plan. A file of **rows** was cut by whoever wrote it:
    each row is one window. In both, tokens are counted from the file's first, in rows row after row.

    Args:
        path: URI, an absolute path where it is local.
        num_tokens: tokens in the file.
        token_size: bytes per token as stored, little-endian.
        format: row of ``tokens.FORMATS``.
        signed: tokens are stored as signed integers.
        offset: bytes before the first token.
        row_length: tokens per row; 0: a stream.
        num_documents: documents whose boundaries are known; 0: no boundaries are known.
        tokenizer: its name, where the file has one.
        columns: what comes with the tokens: some of ``labels``, ``position_ids``, ``sequence_lengths``.
        num_bytes: the file's size; 0: not known.
        sha256: of the file, 64 hexadecimal digits; empty: not known.
    """

    path: str
    num_tokens: int
    token_size: int
    format: str = "ds"
    signed: bool = False
    offset: int = 0
    row_length: int = 0
    num_documents: int = 0
    tokenizer: str = ""
    columns: tuple[str, ...] = ()
    num_bytes: int = 0
    sha256: str = ""

    @property
    def dtype(self) -> "np.dtype[Any]":
        """Of a token as stored."""
        return np.dtype(f"<{'i' if self.signed else 'u'}{self.token_size}")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Shard":
        """The shard whose ``dataclasses.asdict`` went through JSON."""
        return cls(**{**values, "columns": tuple(values.get("columns", ()))})
