"""The hot path: gradients into momentum and chosen coefficients, everybody's coefficients into parameters.

Work goes tile by tile, each about as large as a core's cache, through buffers made once. All chunks of a tile, of
whatever parameters, go through one call; what is left per parameter is moving its rectangle in and out.

    C, H, W     chunks of a tile, rows, columns of a chunk;  K coefficients per chunk;  R ranks
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparktrain.train.compression.dct import Dct
from sparktrain.train.compression.topk import Selector, storage_positions
from sparktrain.train.strategies.distro.layout import Layout, Piece, Tile


@dataclass
class Seconds:
    """Where the time of a step went."""

    transform: float = 0.0
    selection: float = 0.0
    coding: float = 0.0
    communication: float = 0.0
    apply: float = 0.0


@dataclass
class Chosen:
    """Per kind of chunk: index [chunks, K] int32 and value [chunks, K] float32 of the coefficients that are sent, and
    on the rank that sends them their position in the tile, int32."""

    index: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    position: list[Tensor] = field(default_factory=list)


class Tiles:
    """The momentum of all parameters, in the DCT domain, and the work on it."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        most = [max(t.chunks for t in layout.tiles if t.kind == number) for number in range(len(layout.kinds))]
        self.transforms = [Dct(k.height, k.width, c, device) for k, c in zip(layout.kinds, most, strict=True)]
        self.selectors = [Selector(*k, c, device) for k, c in zip(layout.kinds, most, strict=True)]
        self.momentum = [
            torch.zeros(count * kind.area, device=device)
            for kind, count in zip(layout.kinds, layout.chunks, strict=True)
        ]
        """Per kind, tile after tile, each [H, C, W] with row frequencies evens first."""
        largest = max((k.area * c for k, c in zip(layout.kinds, most, strict=True)), default=0)
        self._tile_momenta = {tile: self._tile_momentum(tile) for tile in layout.tiles}
        self._gradient = torch.empty(largest, device=device)
        # One place more: absent coefficients are added there.
        self._sum = torch.zeros(largest + 1, device=device)
        self._contributors = torch.zeros(largest + 1, device=device)
        self.seconds = Seconds()

    def _tile_momentum(self, tile: Tile) -> Tensor:
        """[H, C, W], a view."""
        kind = self.layout.kinds[tile.kind]
        flat = self.momentum[tile.kind][tile.first * kind.area : (tile.first + tile.chunks) * kind.area]
        return flat.view(kind.height, tile.chunks, kind.width)

    def nothing(self) -> Chosen:
        """What a rank sends that has no gradient: everything absent."""
        sizes = list(zip(self.layout.kinds, self.layout.chunks, strict=True))
        index = [
            torch.full((count, kind.topk), kind.area, dtype=torch.int32, device=self.device) for kind, count in sizes
        ]
        value = [torch.zeros(count, kind.topk, device=self.device) for kind, count in sizes]
        return Chosen(index, value, [torch.zeros_like(i) for i in index])

    def add(self, sent: Chosen, sign: int) -> None:
        """Take what was sent out of the momentum (-1) or put it back (+1): exactly, for it is all that was there."""
        for tile in self.layout.tiles:
            self._add(tile, sent, sign)

    def train(
        self,
        gradients: Sequence[Tensor | None],
        decay: float,
        rates: Sequence[float],
        sent: Chosen | None,
        forget_at_once: bool,
    ) -> Chosen:
        """Forget what was ``sent``, accumulate the gradients, choose what to send: tile by tile, while it is in cache.

        Chunks without any gradient rest and send nothing. ``rates``: learning rate by parameter group.
        ``forget_at_once``: take what is chosen out of the momentum too.
        """
        chosen = self.nothing()
        matrices = [
            None if g is None else g.contiguous().view(shape)
            for g, shape in zip(gradients, self.layout.matrices, strict=True)
        ]
        for tile in self.layout.tiles:
            began = time.perf_counter()
            momentum = self._tile_momenta[tile]
            if sent is not None:
                self._add(tile, sent, -1)
            gradient = self._gradient_of(tile, matrices)
            if gradient is None:
                continue
            self.transforms[tile.kind].accumulate(gradient, momentum, decay, rates[tile.group])
            selecting = time.perf_counter()
            chunks = slice(tile.first, tile.first + tile.chunks)
            selected = self.selectors[tile.kind](momentum)
            chosen.index[tile.kind][chunks] = selected.indices
            chosen.value[tile.kind][chunks] = selected.values
            chosen.position[tile.kind][chunks] = selected.positions
            if forget_at_once:
                momentum.view(-1).index_add_(0, selected.positions.view(-1), selected.values.view(-1), alpha=-1)
            self.seconds.transform += selecting - began
            self.seconds.selection += time.perf_counter() - selecting
        return chosen

    def directions(self, received: Chosen) -> Iterator[tuple[Tile, Piece, Tensor]]:
        """The sign of the transformed mean of what all ranks sent, by pieces; overwritten by the next tile's.

        Args:
            received: as :class:`Chosen`, with a first dimension R: index [R, chunks, K], value [R, chunks, K].
        """
        for tile in self.layout.tiles:
            chunks = slice(tile.first, tile.first + tile.chunks)
            samples = self._mean(tile, received.index[tile.kind][:, chunks], received.value[tile.kind][:, chunks])
            yield from self._pieces(tile, samples)

    def own_directions(self) -> Iterator[tuple[Tile, Piece, Tensor]]:
        """The same of this rank's momentum: where the next steps are likely to go."""
        for tile in self.layout.tiles:
            yield from self._pieces(tile, self.transforms[tile.kind].inverse(self._tile_momenta[tile]).transpose(0, 1))

    def region(self, matrix: Tensor, tile: Tile, piece: Piece) -> Tensor:
        """A view of the piece's rectangle of a parameter, shaped as its directions are."""
        kind = self.layout.kinds[tile.kind]
        part = matrix[piece.top : piece.bottom, piece.left : piece.right]
        if not piece.whole:
            return part
        return part.view(part.shape[0] // kind.height, kind.height, part.shape[1] // kind.width, kind.width)

    def _pieces(self, tile: Tile, samples_CHW: Tensor) -> Iterator[tuple[Tile, Piece, Tensor]]:
        samples_CHW.sign_()
        for piece in tile.pieces:
            yield tile, piece, self._in_tile(samples_CHW, tile, piece)

    def _in_tile(self, chunks_CHW: Tensor, tile: Tile, piece: Piece) -> Tensor:
        """The piece's place in a tile, shaped as :meth:`region`; a copy where a strung piece's tile is not flat."""
        kind = self.layout.kinds[tile.kind]
        rows, columns = piece.bottom - piece.top, piece.right - piece.left
        if not piece.whole:
            return chunks_CHW.reshape(-1)[piece.begin : piece.begin + rows * columns].view(rows, columns)
        down, across, first = rows // kind.height, columns // kind.width, piece.begin // kind.area
        part = chunks_CHW[first : first + down * across]
        return part.view(down, across, kind.height, kind.width).transpose(1, 2)

    def _add(self, tile: Tile, sent: Chosen, sign: int) -> None:
        chunks = slice(tile.first, tile.first + tile.chunks)
        position, value = sent.position[tile.kind][chunks], sent.value[tile.kind][chunks]
        # Where less was sent than could be, position 0 stands with the value 0.
        self._tile_momenta[tile].view(-1).index_add_(0, position.view(-1), value.view(-1), alpha=sign)

    def _gradient_of(self, tile: Tile, matrices: Sequence[Tensor | None]) -> Tensor | None:
        """[H, C, W]: a copy, unless one gradient fills the tile: then [H, C / n, n, W], a view."""
        present = [piece for piece in tile.pieces if matrices[piece.parameter] is not None]
        if not present:
            return None
        kind = self.layout.kinds[tile.kind]
        matrix, piece = matrices[tile.pieces[0].parameter], tile.pieces[0]
        if len(tile.pieces) == 1 and matrix is not None and matrix.dtype == torch.float32 and piece.whole:
            return self.region(matrix, tile, piece).transpose(0, 1)
        buffer = self._gradient[: tile.chunks * kind.area]
        # Whole chunks are laid out as the transform reads them; a string is flat, chunk after chunk.
        whole = piece.whole
        chunks = buffer.view(kind.height, tile.chunks, kind.width).transpose(0, 1)
        chunks = chunks if whole else buffer.view(tile.chunks, kind.height, kind.width)
        if not whole or len(present) < len(tile.pieces):
            buffer.zero_()
        for piece in present:
            matrix = matrices[piece.parameter]
            assert matrix is not None
            self._in_tile(chunks, tile, piece).copy_(self.region(matrix, tile, piece))
        return chunks.transpose(0, 1)

    def _mean(self, tile: Tile, index_RCK: Tensor, value_RCK: Tensor) -> Tensor:
        """Samples [C, H, W] of the mean over the ranks that sent a coefficient, added up in rank order."""
        kind, transform = self.layout.kinds[tile.kind], self.transforms[tile.kind]
        ranks = len(index_RCK)
        few = 4 * ranks * kind.topk <= 3 * min(kind.height, kind.width)
        if few:
            index_CK, value_CK = self._merge(tile, index_RCK, value_RCK)
            return transform.inverse_sparse(index_CK.clamp(max=kind.area - 1), value_CK)
        total = self._sum[: tile.chunks * kind.area]
        positions = self._add_up(tile, index_RCK, value_RCK)
        samples = transform.inverse(total.view(kind.height, tile.chunks, kind.width)).transpose(0, 1)
        for position in positions:
            self._sum[position] = 0
        return samples

    def _add_up(self, tile: Tile, index_RCK: Tensor, value_RCK: Tensor) -> list[Tensor]:
        """The mean, scattered into ``_sum``, and where it is not zero: a rank at a time, for within one no coefficient
        comes twice, so that neither order nor atomics can change a bit."""
        kind = self.layout.kinds[tile.kind]
        total, contributors = self._sum, self._contributors
        positions = []
        for index, value in zip(index_RCK, value_RCK, strict=True):
            position = storage_positions(index, kind.height, kind.width, len(total) - 1).view(-1)
            total.index_add_(0, position, value.reshape(-1))
            contributors.index_add_(0, position, (value != 0).view(-1).float())
            positions.append(position)
        means = [total[p] / contributors[p].clamp_(min=1) for p in positions]
        for position, mean in zip(positions, means, strict=True):
            total[position] = mean
            contributors[position] = 0
        return positions

    def _merge(self, tile: Tile, index_RCK: Tensor, value_RCK: Tensor) -> tuple[Tensor, Tensor]:
        """The same as a list without repeats: [C, R * K], where later repeats of a coefficient have the value 0."""
        if len(index_RCK) == 1:
            return index_RCK[0], value_RCK[0]
        values = []
        for position in self._add_up(tile, index_RCK, value_RCK):
            values.append(self._sum[position].view(tile.chunks, -1))
            self._sum[position] = 0
        return index_RCK.transpose(0, 1).reshape(tile.chunks, -1), torch.cat(values, 1)
