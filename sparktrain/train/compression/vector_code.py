"""A vector of float32 in fewer bits: bfloat16, or int8 and int4 levels with one float32 scale per 512 of them.

A level is ``x / scale`` rounded, and the scale makes the largest of its block the largest level: an error is at most
half a scale, that is 1/254 (int8) or 1/14 (int4) of the largest of the block. Bytes are uint8, their number follows
from the length alone, scales come first so that both parts are aligned.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

BLOCK = 512
# A smaller scale has no inverse in float32: such a block is zero.
_SMALLEST = 1e-37

Codec = Literal["bf16", "int8", "int4"]


class VectorCode(NamedTuple):
    """How vectors are written as ``codec``."""

    codec: Codec

    def num_bytes(self, length: int) -> int:
        blocks = -(-length // BLOCK)
        levels = {"bf16": 2 * length, "int8": blocks * BLOCK, "int4": blocks * BLOCK // 2}
        return levels[self.codec] + (0 if self.codec == "bf16" else 4 * blocks)

    def encode(self, vector: Tensor, out: Tensor) -> None:
        """Write ``vector``, all of it finite, into ``out``, ``num_bytes`` of uint8 that begin at a multiple of 4."""
        if self.codec == "bf16":
            out.view(torch.bfloat16).copy_(vector)
            return
        top = 127 if self.codec == "int8" else 7
        rest = -len(vector) % BLOCK
        block = (torch.nn.functional.pad(vector, (0, rest)) if rest else vector).view(-1, BLOCK)
        scale = block.abs().amax(1, keepdim=True).div_(top)
        out[: 4 * len(scale)].view(torch.float32).copy_(scale.view(-1))
        # By the inverse: its rounding could lead past the top by less than half a level, which is rounded away.
        level = (block * torch.where(scale > _SMALLEST, 1 / scale, 0)).round_().view(-1)
        if self.codec == "int8":
            out[4 * len(scale) :].view(torch.int8).copy_(level)
            return
        low, high = level.add_(8).to(torch.uint8).view(2, -1)
        torch.bitwise_or(low, high << 4, out=out[4 * len(scale) :])

    def decode(self, data: Tensor, length: int) -> Tensor:
        """Inverse of :meth:`encode`: a new vector."""
        if self.codec == "bf16":
            return data.view(torch.bfloat16).float()
        split = 4 * -(-length // BLOCK)
        scale, levels = data[:split].view(torch.float32).unsqueeze(1), data[split:]
        if self.codec == "int8":
            level = levels.view(torch.int8).float()
        else:
            level = torch.cat([levels & 15, levels >> 4]).float().sub_(8)
        return level.view(-1, BLOCK).mul_(scale).view(-1)[:length]
