"""Files that are no shard although they are named like one, and tokens of another width, told by their first bytes.

Header-less formats accept any bytes: without this, a download that ended in an error page is trained on.
"""

import numpy as np

# Bytes of the beginning that are looked at.
HEAD = 4096

_UNPACK = "unpack it"
_MAGIC: list[tuple[bytes, str, str]] = [
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer, not the file itself", "run git lfs pull"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", _UNPACK),
    (b"\xfd7zXZ\x00", "xz-compressed", _UNPACK),
    (b"BZh91AY&SY", "bzip2-compressed", _UNPACK),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint is one)", "take it out of the data"),
    (b"\x93NUMPY", "a NumPy array", "name it *.npy"),
    (b"PAR1", "a Parquet file", "name it *.parquet"),
    (b"ARROW1\x00\x00", "an Arrow file", "write it as Parquet"),
]
# Token ids are below 2^20 in every tokenizer there is; the other half of a wider token is below this.
_SMALL = 16
# Tokens below which nothing can be told from their values.
_ENOUGH = 64


def named(head: bytes, suffix: str) -> str | None:
    """What a file named ``*suffix`` that begins with ``head`` is instead of a shard, and what to do; None: nothing."""
    for magic, what, do in _MAGIC:
        if head.startswith(magic) and do != f"name it *{suffix}":
            return f"is {what}: {do}"
    # Two bytes of magic are also a token: the rest of gzip's header must be possible as well.
    if head[:3] == b"\x1f\x8b\x08" and len(head) > 9 and head[3] < 32 and head[8] in (0, 2, 4):
        return f"is gzip-compressed: {_UNPACK}"
    if head[257:262] == b"ustar":
        return f"is a tar archive: {_UNPACK}"
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "is a web page, likely an error message of the server it came from: download it again"
    return None


def misread(head: bytes, token_size: int) -> str | None:
    """What tokens of ``token_size`` unsigned bytes look like that begin with ``head``; None: like such tokens."""
    halves = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2").reshape(-1, 2)
    if halves.size < _ENOUGH:
        return None
    first, second = halves.max(axis=0).tolist()
    if token_size == 2:
        if second < _SMALL and first > 255:
            return "4-byte tokens (every other 2-byte one is almost 0): set data.token_size to 4"
        if int(halves[:, 0].byteswap().max()) < _SMALL and second > 255:
            return "big-endian 4-byte tokens: write it little-endian"
        low, high = int((halves & 255).max()), int((halves >> 8).max())
        if halves.size >= 1024 and low < 200 and high >= 250:
            return "big-endian tokens: write it little-endian"
        return None
    if np.median(halves[:, 1]) < _SMALL:
        return None
    if np.median(halves[:, 0].byteswap()) < _SMALL:
        return "big-endian 4-byte tokens: write it little-endian"
    return "2-byte tokens (4-byte ones would be above a million): set data.token_size to 2"
