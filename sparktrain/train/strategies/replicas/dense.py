"""Contributions to a sync that say something of every weight: exactly, or in few bits.

Exact ones are added up by an all-reduce: its order is the ring's, its bits the same everywhere. Coded ones reach every
rank, which decodes all of them, its own too, and adds them up in rank order: a rank that took its own as it was before
the coding would have other parameters than the rest.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sparktrain.train.compression.vector_code import Codec, VectorCode
from sparktrain.train.strategies.replicas.exchange import HEAD, TAIL, Received
from sparktrain.train.strategies.replicas.flat import Flat, Tile, lengths_of

# A multiple of the coder's blocks, and small enough for a cache; a GPU wants fewer calls.
TILE_WEIGHTS = {"cpu": 1 << 17, "cuda": 1 << 22}


class Contribution(Protocol):
    """How a rank's progress is told the others."""

    @property
    def residual(self) -> Tensor | None:
        """What was not told yet, [weights], or nothing."""

    def write(self, flat: Flat, fragment: int, weight: float) -> tuple[Tensor, float]:
        """A message for ``Exchange.send``, and the square of the L2 norm of the progress, which is not finite if any
        of it is not."""

    def means(self, flat: Flat, fragment: int, received: Received) -> Iterator[tuple[Tile, Tensor]]:
        """The weighted mean of all ranks' progress, tile by tile, in memory that may be written to."""


class Dense:
    """Args:
    codec: how weights are coded; none: not.
    feedback: what coding took is added to the next contribution.
    """

    def __init__(self, flat: Flat, codec: Codec | None, feedback: bool) -> None:
        self.code = VectorCode(codec) if codec else None
        self.residual = torch.zeros(flat.weights, device=flat.device) if feedback else None
        self._buffer = torch.empty(0, device=flat.device)
        longest = max(tile.length for tile in flat.all_tiles())
        self._tile = torch.empty(longest if self.code else 0, device=flat.device)

    def write(self, flat: Flat, fragment: int, weight: float) -> tuple[Tensor, float]:
        tiles = flat.fragments[fragment]
        if self.code:
            return self._write_coded(flat, tiles, self.code)
        length = flat.length(fragment)
        if len(self._buffer) < length + TAIL:
            self._buffer = torch.empty(length + TAIL, device=flat.device)
        message, square = self._buffer[: length + TAIL], 0.0
        for tile in tiles:
            part = flat.progress(tile, message[_place(tiles, tile)])
            square += square_of(part)
            if weight != 1:
                part.mul_(weight)
        return message, square

    def means(self, flat: Flat, fragment: int, received: Received) -> Iterator[tuple[Tile, Tensor]]:
        tiles, begin = flat.fragments[fragment], 0
        for tile in tiles:
            if self.code is None:
                yield tile, received.data[_place(tiles, tile)].div_(received.total)
                continue
            end = begin + self.code.num_bytes(tile.length)
            mean = self._tile[: tile.length].zero_()
            for row, weight in zip(received.data, received.weights, strict=True):
                mean.add_(self.code.decode(row[begin:end], tile.length), alpha=weight)
            begin = end
            yield tile, mean.div_(received.total)

    def _write_coded(self, flat: Flat, tiles: list[Tile], code: VectorCode) -> tuple[Tensor, float]:
        lengths = [tile.length for tile in tiles]
        message = torch.empty(coded_bytes(code, lengths), dtype=torch.uint8, device=flat.device)
        begin, square = HEAD, 0.0
        for tile in tiles:
            part = flat.progress(tile, self._tile[: tile.length])
            square += square_of(part)
            if self.residual is not None:
                part.add_(self.residual[tile.weights])
            end = begin + code.num_bytes(tile.length)
            code.encode(part, message[begin:end])
            if self.residual is not None:
                torch.sub(part, code.decode(message[begin:end], tile.length), out=self.residual[tile.weights])
            begin = end
        return message, square


def coded_bytes(code: VectorCode, lengths: list[int]) -> int:
    """Of a message of tiles of these lengths; a multiple of 8, so that each rank's begins aligned."""
    return -(-(HEAD + sum(map(code.num_bytes, lengths))) // 8) * 8


def message_bytes(codec: Codec | None, weights: int) -> int:
    """Of a message of so many weights: bytes all-gathered, or all-reduced where there is no codec."""
    if codec is None:
        return 4 * (weights + TAIL)
    return coded_bytes(VectorCode(codec), lengths_of(weights, TILE_WEIGHTS["cpu"]))


def square_of(values: Tensor) -> float:
    """The sum of squares: not finite if one of them is not, or is above 1e19."""
    return float(torch.dot(values, values))


def _place(tiles: list[Tile], tile: Tile) -> slice:
    begin = tile.begin - tiles[0].begin
    return slice(begin, begin + tile.length)
