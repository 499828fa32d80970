"""A shard in a cache, one file::

    shard bytes | crc32 of each 4 KiB of them, uint32 little-endian | crc32 of these, uint32 little-endian

Its sha256 is checked once, as the bytes arrive; what is read later is checked against the sums each time, without
reading more than the blocks concerned. These find decay, not forgery. Who knows the crc32 of what it reads, as a rank
does, reads past the sums first, by ``CachedSource.descriptor``.
"""

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from zlib_ng.zlib_ng import crc32

from sparktrain.errors import DataError
from sparktrain.tokens.ahead import read_ahead
from sparktrain.tokens.source import Source

_BLOCK = 4096
# A fetch asks for this much at a time, this many times at once.
_PIECE = 8 << 20
_CONNECTIONS = 4


@dataclass(frozen=True, eq=False)
class Entry:
    """``size`` bytes of a shard, in the file open as ``descriptor``, and the sums of their blocks."""

    descriptor: int
    size: int
    sums: npt.NDArray[np.uint32]

    def read(self, offset: int, length: int) -> bytes | None:
        """Bytes [offset, offset + length), None where they are not what was put there."""
        first, last = offset // _BLOCK, -(-(offset + length) // _BLOCK)
        begin, end = first * _BLOCK, min(last * _BLOCK, self.size)
        raw = os.pread(self.descriptor, end - begin, begin)
        if len(raw) != end - begin:
            return None
        blocks = memoryview(raw)
        for i, expected in enumerate(self.sums[first:last].tolist()):
            if crc32(blocks[i * _BLOCK : (i + 1) * _BLOCK]) != expected:
                return None
        return raw[offset - begin : offset - begin + length]


def open_entry(descriptor: int, size: int) -> Entry | None:
    """The entry of ``size`` bytes in the file open as ``descriptor``, None where that is not whole."""
    if os.fstat(descriptor).st_size != entry_size(size):
        return None
    raw = os.pread(descriptor, entry_size(size) - size, size)
    if len(raw) != entry_size(size) - size or crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return None
    return Entry(descriptor, size, np.frombuffer(raw[:-4], dtype="<u4"))


def entry_size(size: int) -> int:
    """Bytes of the file for a shard of ``size`` bytes."""
    return size + 4 * -(-size // _BLOCK) + 4


def copy(source: Source, descriptor: int, size: int) -> str:
    """Bring ``source`` to the file open as ``descriptor``, with its sums; the sha256 of what came."""
    if source.size() != size:
        raise DataError(
            f"shard {source.uri} has {source.size()} bytes, its manifest says {size}: restore it or make that again"
        )
    pieces = [(begin, min(_PIECE, size - begin)) for begin in range(0, size, _PIECE)]
    hashed, sums, written = hashlib.sha256(), [], 0
    for piece in read_ahead(pieces, lambda piece: source.read(*piece), _CONNECTIONS, _CONNECTIONS):
        hashed.update(piece)
        sums += [crc32(piece[i : i + _BLOCK]) for i in range(0, len(piece), _BLOCK)]
        written += _write(descriptor, piece, written)
    table = np.array(sums, dtype="<u4").tobytes()
    _write(descriptor, table + crc32(table).to_bytes(4, "little"), written)
    return hashed.hexdigest()


def _write(descriptor: int, content: bytes, offset: int) -> int:
    rest = memoryview(content)
    while rest:
        rest = rest[os.pwrite(descriptor, rest, offset + len(content) - len(rest)) :]
    return len(content)
