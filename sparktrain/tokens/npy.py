"""Real NumPy files: one array of tokens, known by its magic.

1-D is a stream; 2-D is rows of equal length, each one window. Little-endian integers of 2 (unsigned), 4 or 8 bytes in
C order. Layout: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import io

import numpy as np

from sparktrain.errors import DataError
from sparktrain.tokens.shard import Shard
from sparktrain.tokens.source import Opener, Source

MAGIC = b"\x93NUMPY"
_TYPES = ("<u2", "<u4", "<i4", "<i8")


def inspect(source: Source, open_if_there: Opener, token_size: int | None) -> Shard | None:
    """The shard that ``source`` is; None where it has no NumPy header."""
    path, num_bytes = source.uri, source.size()
    if num_bytes < len(MAGIC) or source.read(0, len(MAGIC)) != MAGIC:
        return None
    shape, fortran, dtype, offset = _header(path, source.read(0, min(num_bytes, 1 << 16)))
    if dtype.str not in _TYPES or len(shape) not in (1, 2) or (fortran and len(shape) == 2):
        order = "Fortran" if fortran else "C"
        raise DataError(
            f"shard {path} is an array of {dtype.str} of shape {shape} in {order} order: expected 1 or 2 dimensions of "
            f"{', '.join(_TYPES)} in C order"
        )
    num_tokens = int(np.prod(shape, dtype=object))
    if num_tokens == 0:
        raise DataError(f"shard {path} is empty, an array of shape {shape}: remove it or write it again")
    expected = offset + num_tokens * dtype.itemsize
    if num_bytes != expected:
        raise DataError(
            f"shard {path} has {num_bytes} bytes, its header says {expected} (shape {shape} of {dtype.str}): it is "
            "torn; write it again"
        )
    row_length = shape[1] if len(shape) == 2 else 0
    return Shard(path, num_tokens, dtype.itemsize, "npy", dtype.kind == "i", offset, row_length)


def _header(path: str, head: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic], int]:
    """Shape, whether in Fortran order, type, and bytes of the header."""
    file = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except (ValueError, KeyError) as error:
        reason = f"version {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise DataError(f"shard {path} has a NumPy header that cannot be read ({reason}): write it again") from None
    return shape, fortran, dtype, file.tell()
