"""Which weights form which chunk: computed from shapes alone, so every rank has the same layout without a word.

A tensor is seen as a matrix. ``padded`` (the default) cuts whole chunks from it; what fills no chunk, and every tensor
too small for one, is strung together per parameter group and cut into chunks of the same area, with fewer than one
chunk of padding per group. So no dimension is bad: N weights of a group are ceil(N / area) chunks, whatever their
shapes. The last chunk of a group is sent dense where that takes fewer bits.

``divisor`` reproduces Psyche: each edge is the largest divisor of the dimension that is at most the chunk's, vectors
are rows, and a prime dimension degrades to chunks of one weight.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Size

from sparktrain.train.compression.wire import ChunkCode, Values

Cut = Literal["padded", "divisor"]


class Kind(NamedTuple):
    """Chunks of equal shape: they are transformed together."""

    height: int
    width: int
    topk: int

    @property
    def area(self) -> int:
        return self.height * self.width


class Piece(NamedTuple):
    """A rectangle of a parameter (seen as a matrix) in a tile: ``whole`` chunks, or strung weight by weight."""

    parameter: int
    top: int
    bottom: int
    left: int
    right: int
    begin: int
    """First weight of the tile that it fills."""
    whole: bool


class Tile(NamedTuple):
    """Chunks of one kind that are worked on together, small enough for the cache."""

    kind: int
    first: int
    chunks: int
    group: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Layout:
    """kinds, how many chunks there are of each, all tiles, and each parameter's shape as a matrix."""

    kinds: tuple[Kind, ...]
    chunks: tuple[int, ...]
    tiles: tuple[Tile, ...]
    matrices: tuple[tuple[int, int], ...]

    def codes(self, values: Values) -> list[ChunkCode]:
        return [ChunkCode(kind.area, kind.topk, values) for kind in self.kinds]

    def payload_bytes(self, values: Values) -> int:
        """Closed form of what a rank sends per step, the prefix included."""
        codes = zip(self.codes(values), self.chunks, strict=True)
        return prefix_bytes(len(self.matrices)) + sum(code.num_bytes(count) for code, count in codes)


def prefix_bytes(parameters: int) -> int:
    """One byte of status, eight of digest, one bit per parameter: it had a gradient."""
    return 9 + -(-parameters // 8)


def layout_of(
    groups: Sequence[Sequence[Size]], chunk: int, topk: int, values: Values, cut: Cut, tile_weights: int
) -> Layout:
    """Layout of parameter groups. ``tile_weights``: weights per tile, about what a core's cache holds."""
    matrices = [_as_matrix(shape, chunk, cut) for group in groups for shape in group]
    builder = _Builder(matrices, tile_weights)
    first = 0
    for number, group in enumerate(groups):
        members = range(first, first + len(group))
        first += len(group)
        if cut == "divisor":
            for member, shape in zip(members, group, strict=True):
                if 0 in shape:
                    continue
                rows = _largest_divisor(shape[-2], chunk) if len(shape) >= 2 else 1
                columns = _largest_divisor(matrices[member][1], chunk)
                kind = Kind(rows, columns, min(topk, rows * columns))
                builder.whole_chunks(number, kind, [member])
        else:
            builder.whole_chunks(number, Kind(chunk, chunk, topk), members)
            builder.string(number, Kind(chunk, chunk, topk), members, values)
    return builder.layout()


class _Builder:
    """Collects tiles; a kind's chunks are numbered in the order in which they come."""

    def __init__(self, matrices: list[tuple[int, int]], tile_weights: int) -> None:
        self.matrices, self.tile_weights = matrices, tile_weights
        self.kinds: dict[Kind, int] = {}
        self.chunks: list[int] = []
        self.tiles: list[Tile] = []

    def layout(self) -> Layout:
        return Layout(tuple(self.kinds), tuple(self.chunks), tuple(self.tiles), tuple(self.matrices))

    def whole_chunks(self, group: int, kind: Kind, members: Sequence[int]) -> None:
        """Tiles of the whole chunks of these parameters: bands of chunk rows, of one parameter after the other."""
        room = max(1, self.tile_weights // kind.area)
        pieces: list[Piece] = []
        used = 0
        for member in members:
            rows, columns = self.matrices[member]
            down, across = rows // kind.height, columns // kind.width
            if 2 * used >= room:  # a tile of one parameter needs no copy
                self._add(group, kind, used, pieces)
                pieces, used = [], 0
            for left in range(0, across, room):
                right = min(across, left + room)
                top = 0
                while top < down:
                    if used + (right - left) > room:
                        self._add(group, kind, used, pieces)
                        pieces, used = [], 0
                    bottom = min(down, top + (room - used) // (right - left))
                    edges = (top * kind.height, bottom * kind.height, left * kind.width, right * kind.width)
                    pieces.append(Piece(member, *edges, used * kind.area, True))
                    used += (bottom - top) * (right - left)
                    top = bottom
        self._add(group, kind, used, pieces)

    def string(self, group: int, kind: Kind, members: Sequence[int], values: Values) -> None:
        """Tiles of all the weights of these parameters that fill no whole chunk."""
        room = max(1, self.tile_weights // kind.area) * kind.area
        pieces: list[Piece] = []
        used = 0
        for member in members:
            for rectangle in _leftovers(*self.matrices[member], kind):
                remaining = rectangle
                while remaining:
                    taken, remaining = _split(remaining, room - used)
                    for top, bottom, left, right in taken:
                        pieces.append(Piece(member, top, bottom, left, right, used, False))
                        used += (bottom - top) * (right - left)
                    if used == room:
                        self._add(group, kind, used // kind.area, pieces)
                        pieces, used = [], 0
        self._add_string_end(group, kind, used, pieces, values)

    def _add_string_end(self, group: int, kind: Kind, used: int, pieces: list[Piece], values: Values) -> None:
        rest = used % kind.area
        dense, sparse = ChunkCode(rest, rest, values), ChunkCode(kind.area, kind.topk, values)
        if rest == 0 or dense.num_bytes(1) > sparse.num_bytes(1):
            self._add(group, kind, -(-used // kind.area), pieces)
            return
        border = used - rest
        body = [part for piece in pieces for part in _clip(piece, 0, border)]
        tail = [part for piece in pieces for part in _clip(piece, border, used)]
        self._add(group, kind, border // kind.area, body)
        self._add(group, Kind(1, rest, rest), 1, tail)

    def _add(self, group: int, kind: Kind, count: int, pieces: list[Piece]) -> None:
        if count == 0:
            return
        number = self.kinds.setdefault(kind, len(self.kinds))
        if number == len(self.chunks):
            self.chunks.append(0)
        self.tiles.append(Tile(number, self.chunks[number], count, group, tuple(pieces)))
        self.chunks[number] += count


Rectangle = tuple[int, int, int, int]


def _leftovers(rows: int, columns: int, kind: Kind) -> Iterator[list[Rectangle]]:
    """Right of the whole chunks, and below them."""
    height, width = rows // kind.height * kind.height, columns // kind.width * kind.width
    if not height or not width:
        height = width = 0
    if height and columns > width:
        yield [(0, height, width, columns)]
    if rows > height and columns:
        yield [(height, rows, 0, columns)]


def _split(rectangles: list[Rectangle], room: int) -> tuple[list[Rectangle], list[Rectangle]]:
    """The first ``room`` weights, row by row, and the others: each as at most three rectangles."""
    taken: list[Rectangle] = []
    rest = list(rectangles)
    while rest and room:
        top, bottom, left, right = rest.pop(0)
        columns = right - left
        if (bottom - top) * columns <= room:
            taken.append((top, bottom, left, right))
            room -= (bottom - top) * columns
            continue
        full, part = divmod(room, columns)
        middle = top + full
        if full:
            taken.append((top, middle, left, right))
        if part:
            taken.append((middle, middle + 1, left, left + part))
            rest.insert(0, (middle, middle + 1, left + part, right))
            middle += 1
        if middle < bottom:
            rest.insert(1 if part else 0, (middle, bottom, left, right))
        room = 0
    return taken, rest


def _clip(piece: Piece, begin: int, end: int) -> list[Piece]:
    """The part of a strung piece that fills weights begin .. end of the tile, renumbered from ``begin``."""
    size = (piece.bottom - piece.top) * (piece.right - piece.left)
    low, high = max(begin, piece.begin) - piece.begin, min(end, piece.begin + size) - piece.begin
    if low >= high:
        return []
    _, rest = _split([(piece.top, piece.bottom, piece.left, piece.right)], low)
    taken, _ = _split(rest, high - low)
    clipped, at = [], piece.begin + low - begin
    for top, bottom, left, right in taken:
        clipped.append(Piece(piece.parameter, top, bottom, left, right, at, False))
        at += (bottom - top) * (right - left)
    return clipped


def _as_matrix(shape: Size, chunk: int, cut: Cut) -> tuple[int, int]:
    """(rows, columns): all but the last dimension are rows, or the split that leaves the fewest weights over."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(len(shape) - 1, 0, -1)]
    if cut == "divisor":
        return splits[0]
    return max(splits, key=lambda edges: (edges[0] // chunk) * (edges[1] // chunk))


def _largest_divisor(size: int, limit: int) -> int:
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0) if size else 0
