"""One rank's chosen coefficients as bytes, and back: a layout computed from sizes alone, no headers.

    B     chunks;  K coefficients of a chunk;  W ranks

All indices, and values of one or two bits, are one string of bits; then the other values; then, in bfloat16 and per
chunk, a scale for int8, two sizes for 2bit: a value's sign, and whether it is larger than its chunk's mean, of which
the receiver makes the mean of those that are or of those that are not. Index ``area`` with value 0 means that the
chunk has fewer than K coefficients that are not zero.
gloo refuses 16-bit integers, so everything is uint8.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sparktrain.train.compression.index_code import decode_index, encode_index, index_bits

Values = Literal["fp32", "bf16", "int8", "2bit", "1bit"]
VALUES: tuple[str, ...] = get_args(Values)
_VALUE_BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "2bit": 0, "1bit": 0}
_VALUE_BITS = {"2bit": 2, "1bit": 1}
_CHUNK_BYTES = {"int8": 2, "2bit": 4}


class ChunkCode(NamedTuple):
    """How chunks of ``area`` coefficients, ``topk`` of them sent, are written."""

    area: int
    topk: int
    values: Values

    @property
    def bits(self) -> int:
        """Bits per chunk in the string of bits: indices and signs."""
        if self.values in _VALUE_BITS:
            return index_bits(self.area, self.topk) + self.topk * _VALUE_BITS[self.values]
        return 0 if self.dense else index_bits(self.area, self.topk)

    @property
    def dense(self) -> bool:
        """Everything is sent, with room for a zero: indices are not."""
        return self.topk == self.area and self.values not in _VALUE_BITS

    def num_bytes(self, chunks: int) -> int:
        per_chunk = self.topk * _VALUE_BYTES[self.values] + _CHUNK_BYTES.get(self.values, 0)
        return -(-chunks * self.bits // 8) + chunks * per_chunk

    def encode(self, index_BK: Tensor, value_BK: Tensor) -> Tensor:
        """Bytes of ascending indices and their values."""
        bits = [] if self.dense else encode_index(index_BK, self.area)
        if self.dense:
            everywhere = value_BK.new_zeros(len(value_BK), self.area + 1)
            value_BK = everywhere.scatter_(1, index_BK.long(), value_BK)[:, : self.area]
        if self.values in _VALUE_BITS:
            bits.append((value_BK < 0).to(torch.uint8).view(-1))
        if self.values == "2bit":
            bits.append(_is_large(value_BK).to(torch.uint8).view(-1))
        parts = [pack_bits(torch.cat(bits))] if bits else []
        return torch.cat([*parts, *_value_bytes(value_BK, self.values)])

    def decode(self, payload: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
        """``(index_BK, value_BK)``, int64 and float32; ``ValueError`` where the bytes are damaged."""
        split = -(-chunks * self.bits // 8)
        bits = unpack_bits(payload[:split], chunks * self.bits)
        if self.dense:
            index = torch.arange(self.area, device=payload.device).expand(chunks, -1)
        else:
            taken = chunks * index_bits(self.area, self.topk)
            index, bits = decode_index(bits[:taken], chunks, self.topk, self.area), bits[taken:]
        if self.values in _VALUE_BITS:
            value = 1 - 2 * bits[: chunks * self.topk].view(chunks, self.topk).to(torch.float32)
            if self.values == "2bit":
                size_B2 = payload[split:].clone().view(torch.bfloat16).view(chunks, 2).float()
                value *= size_B2.gather(1, bits[chunks * self.topk :].view(chunks, self.topk).long())
        else:
            value = _values(payload[split:], chunks, self.topk, self.values)
        return index, value.masked_fill_(index == self.area, 0)


def pack_bits(bits: Tensor) -> Tensor:
    """Eight bits to a byte. Bit j of byte i is bit j * bytes + i, so that packing is eight operations on long rows."""
    length = -(-len(bits) // 8)
    rows = torch.nn.functional.pad(bits, (0, 8 * length - len(bits))).view(8, length)
    packed = rows[0].clone()
    for j in range(1, 8):
        packed |= rows[j] << j
    return packed


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """Inverse of :func:`pack_bits`: uint8 of 0 and 1."""
    rows = torch.stack([(packed >> j) & 1 for j in range(8)])
    return rows.view(-1)[:length]


def _value_bytes(value_BK: Tensor, values: Values) -> list[Tensor]:
    if values == "fp32":
        return [value_BK.contiguous().view(torch.uint8).view(-1)]
    if values == "bf16":
        return [value_BK.to(torch.bfloat16).view(torch.uint8).view(-1)]
    if values == "int8":
        scale = (value_BK.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
        # The scale is rounded, maybe down: without the clamp the largest value could wrap.
        level = torch.where(scale > 0, value_BK / scale.float(), 0).round_().clamp_(-127, 127)
        return [level.to(torch.int8).view(torch.uint8).view(-1), scale.view(torch.uint8).view(-1)]
    if values == "2bit":
        size, large = value_BK.abs(), _is_large(value_BK)
        small = ~large & (size > 0)
        means = [(size * part).sum(1) / part.sum(1).clamp(min=1) for part in (small, large)]
        return [torch.stack(means, 1).to(torch.bfloat16).view(torch.uint8).view(-1)]
    return []


def _is_large(value_BK: Tensor) -> Tensor:
    """Whether a value is larger than the mean of its chunk's, of those that are not zero."""
    size = value_BK.abs()
    return size > size.sum(1, keepdim=True) / (size > 0).sum(1, keepdim=True).clamp(min=1)


def _values(payload: Tensor, chunks: int, topk: int, values: Values) -> Tensor:
    # A copy: a slice of bytes may start where a wider type must not.
    data = payload[: chunks * topk * _VALUE_BYTES[values]].clone()
    if values == "fp32":
        return data.view(torch.float32).view(chunks, topk)
    if values == "bf16":
        return data.view(torch.bfloat16).view(chunks, topk).float()
    scale = payload[chunks * topk :].clone().view(torch.bfloat16).view(chunks, 1)
    return data.view(torch.int8).view(chunks, topk).float() * scale.float()
