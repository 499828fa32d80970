"""One rank's message of one step, and what all ranks' messages say together.

A message is one byte of status, eight of the parameters' digest (zeros where it is not due), one bit per parameter
that had a gradient, and the chosen coefficients kind by kind. Its size follows from the layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sparktrain.train.compression.wire import Values, pack_bits, unpack_bits
from sparktrain.train.strategies.distro.layout import Layout, prefix_bytes
from sparktrain.train.strategies.distro.tiles import Chosen, Seconds
from sparktrain.train.strategies.replicas.agreement import from_bytes, to_bytes

_DIGEST = slice(1, 9)


class Said(NamedTuple):
    """What all ranks said: coefficients (a first dimension for ranks), and the parameters that have a gradient
    anywhere."""

    chosen: Chosen
    moved: list[bool]


@dataclass(frozen=True)
class Numbers:
    """One step: bytes this rank sent once and bytes it received; how many times fewer it received than a ring
    all-reduce of the gradient in bfloat16 and float32 would bring; where the time went."""

    payload_bytes: int = 0
    received_bytes: int = 0
    fewer_than_ring_bf16: float = 0.0
    fewer_than_ring_fp32: float = 0.0
    seconds: Seconds = field(default_factory=Seconds)


def numbers_of(payload_bytes: int, weights: int, world: int, seconds: Seconds) -> Numbers:
    """The (W - 1) of the all-gather and of the ring cancel, so the ratio makes sense for one rank too."""
    per_byte = 2 * weights / (world * payload_bytes)
    return Numbers(payload_bytes, (world - 1) * payload_bytes, 2 * per_byte, 4 * per_byte, seconds)


def write(
    layout: Layout, values: Values, chosen: Chosen, gradients: Sequence[Tensor | None], failed: bool, digest: int
) -> Tensor:
    """The message, uint8."""
    device = chosen.index[0].device if chosen.index else torch.device("cpu")
    present = torch.tensor([g is not None for g in gradients], dtype=torch.uint8, device=device)
    status = torch.tensor([failed], dtype=torch.uint8, device=device)
    parts = [status, to_bytes(digest, device), pack_bits(present)]
    for code, index, value in zip(layout.codes(values), chosen.index, chosen.value, strict=True):
        parts.append(code.encode(index, value))
    return torch.cat(parts)


def failed_ranks(everyones: Tensor) -> list[int]:
    """Ranks whose gradient was not finite."""
    return [rank for rank, status in enumerate(everyones[:, 0].tolist()) if status]


def digests(everyones: Tensor) -> list[int]:
    return [from_bytes(row) for row in everyones[:, _DIGEST]]


def read(layout: Layout, values: Values, everyones: Tensor) -> Said:
    """``ValueError`` where a message is damaged."""
    parameters = len(layout.matrices)
    begin = prefix_bytes(parameters)
    present = everyones[0, 9:begin].clone()
    for row in everyones[1:]:
        present |= row[9:begin]
    said = Chosen()
    for code, chunks in zip(layout.codes(values), layout.chunks, strict=True):
        end = begin + code.num_bytes(chunks)
        decoded = [code.decode(row[begin:end], chunks) for row in everyones]
        said.index.append(torch.stack([index for index, _ in decoded]))
        said.value.append(torch.stack([value for _, value in decoded]))
        begin = end
    return Said(said, unpack_bits(present, parameters).bool().tolist())
