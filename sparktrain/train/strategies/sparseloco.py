"""SparseLoCo: every rank takes H steps of its own, then sends the largest of its progress (arXiv 2508.15706).

Of each 4096 weights in a row a rank sends the 64 that have moved most, with two bits each, and keeps the rest::

    e = error_decay * e + (theta - x)
    send q = the k largest |e| of each chunk, coded;  e = e - q as it is decoded
    theta = theta - outer_lr * mean over ranks of q;  x = theta

One uint8 all-gather per round. There is no outer momentum: the residual ``e`` takes its place, and holds for some
1 / (1 - error_decay) rounds what was not sent. Progress is sent as it is: DCT and sign, which DisTrO needs, do harm
here. Chunks are cut from the parameters as they lie end to end, so that no shape is a bad one; the last one is filled
with zeros, which are never sent.

What a round, ``sync()`` and the state are is in ``replicas/local_steps.py``. Memory: two float32 per weight.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparktrain.config import Optimizer, Sparseloco
from sparktrain.errors import ConfigError
from sparktrain.train.compression.topk import Selector
from sparktrain.train.compression.wire import ChunkCode, Values
from sparktrain.train.strategies.contract import Traffic
from sparktrain.train.strategies.inner import adamw, retune
from sparktrain.train.strategies.replicas.cadence import Bounds, Every, first_every
from sparktrain.train.strategies.replicas.dense import TILE_WEIGHTS, square_of
from sparktrain.train.strategies.replicas.exchange import HEAD, Received
from sparktrain.train.strategies.replicas.flat import Flat, Tile, named
from sparktrain.train.strategies.replicas.local_steps import LocalSteps

# What was not sent waits for some twenty rounds: fewer than fifty leave too much of it behind.
BOUNDS = Bounds(steps=5, rounds=50)
_VALUES: dict[int, Values] = {2: "2bit", 8: "int8"}


class SparseLoCo(LocalSteps):
    """See the module; a plain PyTorch object, used as ``DiLoCo`` is.

    Args:
        params: parameters that are shared: those of ``inner``, with gradient or without.
        inner: takes this rank's steps.
        sync_every: H, or "auto", see ``replicas/cadence.py``.
        outer_lr: 1 is the paper's; lower where the loss stops falling late in a run.
        compression_topk: weights sent per chunk.
        compression_chunk: a chunk is so many times so many weights.
        error_decay: of the residual, in [0, 1].
        quantize_bits: of a value: 2, or 8.
        process_group: ranks to train with; none: all, or this process where torch.distributed is not in use.
        planned_steps: of the run, for what is "auto"; 0: unknown, but many.
        require_exact_steps: a rank that comes to a sync with another number of steps is an error.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        inner: torch.optim.Optimizer,
        *,
        sync_every: Every,
        outer_lr: float = 1.0,
        compression_topk: int = 64,
        compression_chunk: int = 64,
        error_decay: float = 0.95,
        quantize_bits: int = 2,
        process_group: dist.ProcessGroup | None = None,
        planned_steps: int = 0,
        require_exact_steps: bool = True,
    ) -> None:
        _check(outer_lr, compression_topk, compression_chunk, error_decay, quantize_bits)
        names, parameters = named(params)
        device = parameters[0].device.type if parameters else "cpu"
        flat = Flat(parameters, 1, _tile_weights(compression_chunk, device))
        self.outer_lr = outer_lr
        self._sparse = Sparse(flat, compression_chunk, compression_topk, _VALUES[quantize_bits], error_decay)
        self._wire = f"{compression_topk} of {compression_chunk}x{compression_chunk} weights, {quantize_bits} bits"
        self._told_by = f"outer_lr {outer_lr}, error_decay {error_decay}"
        super().__init__(
            flat,
            names,
            inner,
            self._sparse,
            sync_every=sync_every,
            bounds=BOUNDS,
            planned_steps=planned_steps,
            exact=require_exact_steps,
            group=process_group,
        )

    def retune(self, optimizer: Optimizer, section: Sparseloco) -> None:
        retune(self.optimizer, optimizer)
        self.outer_lr, self._sparse.decay = section.outer_lr, section.error_decay

    def _layout(self) -> str:
        return f"{super()._layout()}, {self._wire}"

    def _rules(self) -> str:
        return f"{super()._rules()}, {self._told_by}, planned_steps {self.cadence.planned_steps}"

    def _move(self, tile: Tile, mean: Tensor) -> None:
        self._flat.shared[tile.weights].add_(mean, alpha=-self.outer_lr)


class Sparse:
    """Contributions that say something of the largest weights only. One message is coded as a whole: a tile's share of
    it is too small to be worth the calls."""

    def __init__(self, flat: Flat, chunk: int, topk: int, values: Values, decay: float) -> None:
        self._chunk, self.decay, self._weights = chunk, decay, flat.weights
        self._code = ChunkCode(chunk * chunk, topk, values)
        self._chunks = -(-flat.weights // self._code.area)
        # Whole chunks, and one weight more, where coefficients go that are absent.
        self._residual = torch.zeros(self._chunks * self._code.area + 1, device=flat.device)
        most = max(tile.length for tile in flat.all_tiles()) // self._code.area + 1
        self._tile = torch.zeros(most * self._code.area + 1, device=flat.device)
        self._select = Selector(chunk, chunk, topk, most, flat.device)

    @property
    def residual(self) -> Tensor:
        return self._residual[: self._weights]

    def write(self, flat: Flat, fragment: int, weight: float) -> tuple[Tensor, float]:
        chosen, square = [], 0.0
        for tile in flat.fragments[fragment]:
            part = flat.progress(tile, self._tile[: tile.length])
            square += square_of(part)
            self._residual[tile.weights].mul_(self.decay).add_(part)
            first, chunks = self._place(tile)
            told = self._residual[first * self._code.area :][: chunks * self._code.area]
            # The selector reads row after row of all chunks; a chunk's weights stay in a row.
            chosen.append(self._select(told.view(chunks, self._chunk, self._chunk).transpose(0, 1).contiguous()))
        head = torch.zeros(HEAD, dtype=torch.uint8, device=flat.device)
        message = self._code.encode(torch.cat([c.indices for c in chosen]), torch.cat([c.values for c in chosen]))
        index, value = self._code.decode(message, self._chunks)
        self._add(self._residual, index, value, -1.0)
        return torch.cat([head, message]), square

    def means(self, flat: Flat, fragment: int, received: Received) -> Iterator[tuple[Tile, Tensor]]:
        said = [self._code.decode(row, self._chunks) for row in received.data]
        for tile in flat.fragments[fragment]:
            first, chunks = self._place(tile)
            mean = self._tile.zero_()
            for (index, value), weight in zip(said, received.weights, strict=True):
                rows = slice(first, first + chunks)
                self._add(mean, index[rows], value[rows], weight / received.total)
            yield tile, mean[: tile.length]

    def _place(self, tile: Tile) -> tuple[int, int]:
        """First chunk of a tile, and how many it has."""
        return tile.begin // self._code.area, -(-tile.length // self._code.area)

    def _add(self, to: Tensor, index_CK: Tensor, value_CK: Tensor, weight: float) -> None:
        """Add coefficients, times ``weight``, to weights that end with the one for absent coefficients."""
        begin = self._code.area * torch.arange(len(index_CK), device=to.device).unsqueeze(1)
        place = torch.where(index_CK == self._code.area, len(to) - 1, index_CK + begin)
        to.index_add_(0, place.view(-1), value_CK.reshape(-1), alpha=weight)


def build(
    parameters: dict[str, torch.nn.Parameter], section: Sparseloco, optimizer: Optimizer, steps: int
) -> SparseLoCo:
    trained = [(name, p) for name, p in parameters.items() if p.requires_grad]
    settings = section.model_dump(exclude={"kind"})
    return SparseLoCo(trained, adamw(parameters, optimizer), planned_steps=steps, **settings)


def traffic_per_step(shapes: Sequence[torch.Size], section: Sparseloco, world: int, element_bytes: int = 4) -> Traffic:
    """The mean over a round; ``sync_every="auto"`` counts as the fewest steps it may choose."""
    chunk = section.compression_chunk
    code = ChunkCode(chunk * chunk, section.compression_topk, _VALUES[section.quantize_bits])
    chunks, traffic = -(-sum(shape.numel() for shape in shapes) // code.area), Traffic()
    if world > 1:
        traffic.add_all_gather(HEAD + code.num_bytes(chunks), world)
    return traffic.per_step(first_every(section.sync_every, 1, BOUNDS))


def _tile_weights(chunk: int, device: str) -> int:
    """Whole chunks, an even number of weights; fewer tiles on a GPU."""
    pair = 2 * chunk * chunk
    return max(1, TILE_WEIGHTS.get(device, TILE_WEIGHTS["cuda"]) // pair) * pair


def _check(lr: float, topk: int, chunk: int, decay: float, bits: int) -> None:
    """``ConfigError`` naming the setting that is out of range."""
    if not 0 < lr < float("inf"):
        raise ConfigError(f"outer_lr is {lr}: expected a number above 0")
    if chunk < 1:
        raise ConfigError(f"compression_chunk is {chunk}: expected at least 1")
    if not 1 <= topk <= chunk**2:
        raise ConfigError(f"compression_topk is {topk}: expected 1 to {chunk**2}, what a chunk holds")
    if not 0 <= decay <= 1:
        raise ConfigError(f"error_decay is {decay}: expected a number in [0, 1]")
    if bits not in _VALUES:
        raise ConfigError(f"quantize_bits is {bits}: expected 2 or 8")
