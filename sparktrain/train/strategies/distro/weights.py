"""The parameters as DisTrO moves them: exact in bfloat16, and back from a look-ahead to the bit.

A sign step is often smaller than half the distance of two bfloat16 numbers and would vanish. So the sixteen bits that
a bfloat16 parameter lacks to be a float32 are kept beside it: parameter and rest together are a float32 master, at
half the memory of a copy. The parameter is that master rounded to nearest, ties away from zero.
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparktrain.train.strategies.distro.layout import Piece, Tile
from sparktrain.train.strategies.distro.tiles import Tiles
from sparktrain.train.strategies.replicas.agreement import digest


class Weights:
    """Parameters, the rests of the bfloat16 ones, and where they were before the look-ahead."""

    def __init__(self, parameters: Sequence[Tensor], tiles: Tiles) -> None:
        self.parameters, self._tiles = list(parameters), tiles
        self._matrices = tiles.layout.matrices
        self.rests = {
            number: torch.zeros(p.shape, dtype=torch.int16, device=p.device)
            for number, p in enumerate(self.parameters)
            if p.dtype == torch.bfloat16
        }
        self._before: list[Tensor] = []
        self.ahead = False

    def apply(
        self,
        directions: Iterable[tuple[Tile, Piece, Tensor]],
        moved: Sequence[bool],
        groups: Sequence[dict[str, Any]],
    ) -> None:
        """One step of ``groups``' lr and weight decay, of the parameters that are moved."""
        lrs = [group["lr"] for group in groups]
        keeps = [1 - group["lr"] * group["weight_decay"] for group in groups]
        for tile, piece, direction in directions:
            if moved[piece.parameter]:
                self._move(tile, piece, direction, lrs[tile.group], keeps[tile.group])

    def decay(self, groups: Sequence[dict[str, Any]]) -> None:
        """Weight decay alone: the first step of an overlapped run has nothing to apply yet."""
        keeps = [1 - group["lr"] * group["weight_decay"] for group in groups for _ in group["params"]]
        for number, (parameter, keep) in enumerate(zip(self.parameters, keeps, strict=True)):
            if number in self.rests:
                split_master(join_master(parameter, self.rests[number]).mul_(keep), parameter, self.rests[number])
            else:
                parameter.mul_(keep)

    def look_ahead(self, lrs: Sequence[float]) -> None:
        """Go where this rank's momentum points, by the group's lr; :meth:`restore` comes back."""
        if not self._before:
            self._before = [torch.empty_like(p) for p in self.parameters]
        began = time.perf_counter()
        torch._foreach_copy_(self._before, self.parameters)
        self.ahead = True
        for tile, piece, direction in self._tiles.own_directions():
            region = self._region(self.parameters[piece.parameter], tile, piece)
            if piece.parameter in self.rests:
                rest = self._region(self.rests[piece.parameter], tile, piece)
                region.copy_(join_master(region, rest).sub_(direction, alpha=lrs[tile.group]))
            else:
                region.sub_(direction, alpha=lrs[tile.group])
        self._tiles.seconds.apply += time.perf_counter() - began

    def restore(self) -> None:
        """Back from the look-ahead, to the bit."""
        if self.ahead:
            torch._foreach_copy_(self.parameters, self._before)
            self.ahead = False

    def current(self) -> list[Tensor]:
        """The parameters without look-ahead, as they are: not copies."""
        return self._before if self.ahead else self.parameters

    def digest(self) -> int:
        """Eight bytes that differ where any bit of a parameter or rest does."""
        return digest([*self.current(), *self.rests.values()])

    def _move(self, tile: Tile, piece: Piece, direction: Tensor, lr: float, keep: float) -> None:
        """``parameter = keep * parameter - lr * direction`` on a piece."""
        region = self._region(self.parameters[piece.parameter], tile, piece)
        if piece.parameter in self.rests:
            rest = self._region(self.rests[piece.parameter], tile, piece)
            split_master(join_master(region, rest).mul_(keep).sub_(direction, alpha=lr), region, rest)
            return
        if keep != 1:
            region.mul_(keep)
        region.sub_(direction, alpha=lr)

    def _region(self, tensor: Tensor, tile: Tile, piece: Piece) -> Tensor:
        return self._tiles.region(tensor.view(self._matrices[piece.parameter]), tile, piece)


def join_master(parameter: Tensor, rest: Tensor) -> Tensor:
    """The float32 of which ``parameter`` (bfloat16) is the rounded upper half and ``rest`` (int16) what is left."""
    return ((parameter.view(torch.int16).to(torch.int32) << 16) + rest).view(torch.float32)


def split_master(master: Tensor, parameter: Tensor, rest: Tensor) -> None:
    """Inverse of :func:`join_master`, written into ``parameter`` and ``rest``."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    parameter.view(torch.int16).copy_(upper)
    rest.copy_(bits - (upper << 16))
