"""Megatron-LM's and nanotron's indexed data: ``X.bin`` with ``X.idx`` beside it. A stream with document boundaries.

``X.bin``  tokens, sequence after sequence
``X.idx``  ``MMIDIDX`` and two zero bytes; u64 version 1; u8 type of the tokens; u64 sequences; u64 entries of the
           document index; i32 length in tokens per sequence; i64 offset in bytes per sequence; i64 document index
           (the first sequence of each document, and the number of sequences); u8 mode per sequence, or nothing

All little-endian. Layout as read by ``indexed_dataset.py`` (github.com/NVIDIA/Megatron-LM).
"""

import struct

import numpy as np
import numpy.typing as npt

from sparktrain.errors import DataError
from sparktrain.tokens.shard import Shard
from sparktrain.tokens.source import Opener, Source

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f8", 7: "f4", 8: "u2"}


def inspect(source: Source, open_if_there: Opener, token_size: int | None) -> Shard | None:
    """The shard that ``source`` is; None where there is no ``.idx`` beside it. Of that, the header is read."""
    path, num_bytes = source.uri, source.size()
    index = open_if_there(_index(path))
    if index is None:
        return None
    kind, _, entries = _read_header(index)
    index.close()
    size = int(kind[1])
    if num_bytes % size:
        raise DataError(
            f"shard {path} has {num_bytes} bytes, not a multiple of the {size} that {_index(path)} says a token has: "
            "one of the two is from another file; write both again"
        )
    if token_size and token_size != size:
        raise DataError(
            f"shard {path} has tokens of {size} bytes by its .idx, data.token_size is {token_size}: "
            "leave data.token_size out, or write the shard again"
        )
    return Shard(path, num_bytes // size, size, "megatron", kind[0] == "i", num_documents=entries - 1)


def document_ends(shard: Shard, open_if_there: Opener) -> npt.NDArray[np.int64]:
    """Ends of the shard's documents in tokens, exclusive, ``[num_documents]``.

    Raises :class:`DataError` where the index is not that of a file whose sequences follow each other without a gap.
    """
    name = _index(shard.path)
    index = open_if_there(name)
    if index is None:
        raise DataError(f"{name} is gone: it was there when the shard was inspected; restore it")
    _, sequences, entries = _read_header(index)
    raw = index.read(_HEADER.size, 12 * sequences + 8 * entries)
    index.close()
    lengths = np.frombuffer(raw, "<i4", sequences).astype(np.int64)
    offsets = np.frombuffer(raw, "<i8", sequences, 4 * sequences)
    documents = np.frombuffer(raw, "<i8", entries, 12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64)
    negative, astray = lengths < 0, offsets != (ends - lengths) * shard.token_size
    if (wrong := np.flatnonzero(negative | astray)).size:
        i = int(wrong[0])
        raise DataError(
            f"{name} has sequence {i} of {lengths[i]} tokens at byte {offsets[i]}, expected at byte "
            f"{(ends[i] - lengths[i]) * shard.token_size}, where the one before it ends: write it again"
        )
    if ends[-1] != shard.num_tokens:
        raise DataError(
            f"{name} has {ends[-1]} tokens, {shard.path} has {shard.num_tokens}: one of the two is from another file; "
            "write both again"
        )
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise DataError(
            f"{name} has a document index that does not rise from 0 to its {sequences} sequences: write it again"
        )
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends])
    return np.asarray(starts[documents[1:]], dtype=np.int64)


def _read_header(index: Source) -> tuple[str, int, int]:
    """Type of the tokens, sequences, entries of the document index; the file is as long as these make it."""
    name, num_bytes = index.uri, index.size()
    if num_bytes < _HEADER.size:
        raise DataError(f"{name} has {num_bytes} bytes, fewer than the {_HEADER.size} of its header: write it again")
    magic, version, code, sequences, entries = _HEADER.unpack(index.read(0, _HEADER.size))
    if magic != _MAGIC:
        raise DataError(f"{name} begins with {magic!r}, expected {_MAGIC!r}: it is no Megatron index; write it again")
    if version != 1:
        raise DataError(f"{name} has version {version}, expected 1: write it again")
    kind = _TYPES.get(code, f"unknown code {code}")
    if kind[:1] not in "iu" or code not in _TYPES:
        raise DataError(f"{name} says its tokens are {kind}, expected integers: it holds no tokens")
    if sequences == 0 or entries < 2:
        raise DataError(
            f"{name} has {sequences} sequences and {entries} entries in its document index, expected at least 1 and 2: "
            "write it again"
        )
    expected = _HEADER.size + 12 * sequences + 8 * entries
    if num_bytes not in (expected, expected + sequences):
        raise DataError(
            f"{name} has {num_bytes} bytes, expected {expected} for {sequences} sequences and {entries} entries of its "
            "document index: it is torn; write it again"
        )
    return kind, sequences, entries


def _index(path: str) -> str:
    return path.removesuffix(".bin") + ".idx"
