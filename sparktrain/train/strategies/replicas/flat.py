"""Parameters laid end to end: as all ranks share them, in float32, and as this rank has them.

    tile       so many weights in a row that what is done to them happens in the cache
    piece      the part of a tile that is of one parameter
    fragment   the tiles that are synchronised together; fragments are equal in size, and one may end in a parameter

A bfloat16 parameter cannot hold the shared value, only the shared value rounded: this rank's progress is counted from
there, so that what rounding took is neither sent nor lost.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparktrain.errors import ConfigError

_PRIME = 0x100000001B3
_ODD = 0x4F1BBCDCBFA53E0B


class Piece(NamedTuple):
    """``length`` weights of a parameter from ``begin``, which are those of a tile from ``at``."""

    parameter: int
    begin: int
    at: int
    length: int


class Tile(NamedTuple):
    """``length`` weights from ``begin``, of all that lie end to end."""

    begin: int
    length: int
    pieces: tuple[Piece, ...]

    @property
    def weights(self) -> slice:
        return slice(self.begin, self.begin + self.length)


def named(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[Tensor]]:
    """Names and parameters, given as torch.optim takes them; numbers name those that have no name."""
    pairs = [entry if isinstance(entry, tuple) else (str(i), entry) for i, entry in enumerate(params)]
    return [name for name, _ in pairs], [parameter for _, parameter in pairs]


def bounds_of(weights: int, fragments: int) -> list[int]:
    """Where fragments begin, and the end; even, as a digest reads two weights at once."""
    return [weights * f // fragments // 2 * 2 for f in range(fragments)] + [weights]


def lengths_of(weights: int, tile_weights: int) -> list[int]:
    """Of the tiles of a fragment."""
    return [min(tile_weights, weights - begin) for begin in range(0, weights, tile_weights)]


class Flat:
    """Args:
    parameters: float32, bfloat16 or float16, contiguous, on one device.
    fragments: number of fragments.
    tile_weights: weights of a tile, an even number.
    """

    def __init__(self, parameters: Sequence[Tensor], fragments: int, tile_weights: int) -> None:
        self.parameters = list(parameters)
        _check(self.parameters)
        self.device = self.parameters[0].device
        ends = torch.tensor([0] + [p.numel() for p in self.parameters]).cumsum(0).tolist()
        self.weights = ends[-1]
        if self.weights < 2 * fragments:
            raise ConfigError(f"num_fragments is {fragments}, but there are {self.weights} weights: set it to 1")
        # Even, for digests.
        self.shared = torch.zeros(self.weights + self.weights % 2, device=self.device)
        bounds = bounds_of(self.weights, fragments)
        self.fragments = [list(_tiles(begin, end, tile_weights, ends)) for begin, end in itertools.pairwise(bounds)]
        self._place: Tensor | None = None
        for tile in self.all_tiles():
            for piece, x, _ in self._pieces(tile):
                self.shared[tile.weights][piece.at : piece.at + piece.length].copy_(x)

    def shared_parameters(self) -> list[Tensor]:
        """The shared weights in the shapes and types of the parameters: of float32 ones, not copies."""
        pieces = torch.split(self.shared[: self.weights], [p.numel() for p in self.parameters])
        return [piece.view(p.shape).to(p.dtype) for piece, p in zip(pieces, self.parameters, strict=True)]

    def all_tiles(self) -> list[Tile]:
        return [tile for fragment in self.fragments for tile in fragment]

    def length(self, fragment: int) -> int:
        """Weights of a fragment."""
        return sum(tile.length for tile in self.fragments[fragment])

    def progress(self, tile: Tile, out: Tensor) -> Tensor:
        """Shared minus this rank's weights, [tile.length], in ``out``: the pseudo-gradient."""
        for piece, x, shared in self._pieces(tile):
            part = out[piece.at : piece.at + piece.length]
            if x.dtype == torch.float32:
                torch.sub(shared, x, out=part)
            else:
                part.copy_(shared.to(x.dtype)).sub_(x)
        return out

    def take(self, tile: Tile, alpha: float) -> None:
        """This rank's weights become ``alpha`` of themselves and the rest of the shared ones."""
        for _, x, shared in self._pieces(tile):
            x.copy_(shared if alpha == 0 else torch.lerp(shared, x.float(), alpha))

    def put(self, tile: Tile, progress: Tensor) -> None:
        """This rank's weights become those of which this is the :meth:`progress`."""
        for piece, x, shared in self._pieces(tile):
            x.copy_(shared.to(x.dtype) - progress[piece.at : piece.at + piece.length])

    def digest(self, fragment: int) -> int:
        """Eight bytes that differ where any bit of a shared weight of the fragment does: a sum of pairs of weights as
        64-bit words, each times an odd number of its place."""
        total = 0
        for tile in self.fragments[fragment]:
            words = self.shared[tile.begin : tile.begin + tile.length + tile.length % 2].view(torch.int64)
            if self._place is None or len(self._place) < len(words):
                # Half of 2^64 / golden ratio, so that it fits int64; products wrap around.
                self._place = torch.arange(len(words), device=self.device).mul_(_ODD).bitwise_or_(1)
            place = self._place[: len(words)]
            part = torch.dot(words, place) if self.device.type == "cpu" else (words * place).sum()
            total = (total * _PRIME + int(part)) % 2**64
        return total

    def _pieces(self, tile: Tile) -> list[tuple[Piece, Tensor, Tensor]]:
        """Each with its weights here and the shared ones."""
        shared = self.shared[tile.weights]
        return [
            (
                piece,
                self.parameters[piece.parameter].detach().view(-1)[piece.begin : piece.begin + piece.length],
                shared[piece.at : piece.at + piece.length],
            )
            for piece in tile.pieces
        ]


def _tiles(begin: int, end: int, tile_weights: int, ends: list[int]) -> list[Tile]:
    tiles, parameter = [], 0
    for length in lengths_of(end - begin, tile_weights):
        pieces, at = [], begin
        while at < begin + length:
            while ends[parameter + 1] <= at:
                parameter += 1
            stop = min(begin + length, ends[parameter + 1])
            pieces.append(Piece(parameter, at - ends[parameter], at - begin, stop - at))
            at = stop
        tiles.append(Tile(begin, length, tuple(pieces)))
        begin += length
    return tiles


def _check(parameters: Sequence[Tensor]) -> None:
    if not parameters:
        raise ConfigError("there is no parameter to train: give parameters that require a gradient")
    for number, parameter in enumerate(parameters):
        name = f"parameter {number} of shape {list(parameter.shape)}"
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}: expected float32, bfloat16 or float16; "
                f"convert it or leave it out"
            )
        if not parameter.is_contiguous():
            raise ConfigError(f"{name} is not contiguous in memory: store .contiguous() of it in the model")
        if parameter.device != parameters[0].device:
            raise ConfigError(f"{name} is on {parameter.device}, the first on {parameters[0].device}: use one device")
