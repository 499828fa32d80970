"""What an external trainer wants back in its next round: bytes that only it understands, with their hash."""

import hashlib
from dataclasses import dataclass

import numpy as np

from sparktrain.errors import ModelError

_PIECE = 1 << 20


@dataclass(frozen=True)
class StateBlob:
    """``content_id`` is burn_p2p's: a sha256 multihash of the CBOR array (encoding, bytes as an array of numbers)."""

    encoding: str
    data: bytes
    content_id: str

    @classmethod
    def of(cls, encoding: str, data: bytes) -> "StateBlob":
        return cls(encoding, data, _content_id(encoding, data))

    def check(self) -> None:
        """Raises :class:`ModelError` where the bytes are not those that were hashed."""
        found = _content_id(self.encoding, self.data)
        if found != self.content_id:
            raise ModelError(
                f"the inner optimizer state has content id {found}, expected {self.content_id}: "
                "it was damaged since it was saved; resume from another checkpoint"
            )


def _content_id(encoding: str, data: bytes) -> str:
    text = encoding.encode()
    sha = hashlib.sha256(b"\x82" + _head(3, len(text)) + text + _head(4, len(data)))
    for begin in range(0, len(data), _PIECE):
        numbers = np.frombuffer(data, np.uint8)[begin : begin + _PIECE]
        # CBOR writes a number below 24 as one byte and another one as 0x18 and the byte.
        wide = numbers >= 24
        both = np.stack([np.full_like(numbers, 0x18), numbers], axis=1)
        sha.update(both[np.stack([wide, np.ones_like(wide)], axis=1)].tobytes())
    return f"1220{sha.hexdigest()}"


def _head(major: int, count: int) -> bytes:
    """CBOR's head of an item of type ``major`` with ``count`` elements, in the fewest bytes."""
    if count < 24:
        return bytes([major << 5 | count])
    width = next(w for w in (1, 2, 4, 8) if count < 256**w)
    return bytes([major << 5 | 23 + width.bit_length()]) + count.to_bytes(width, "big")
