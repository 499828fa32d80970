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
from sparktrain.train.strategies.inner import adamw
from sparktrain.train.strategies.replicas.cadence import LEAST, Every
from sparktrain.train.strategies.replicas.dense import TILE_WEIGHTS, is_finite
from sparktrain.train.strategies.replicas.exchange import HEAD, Received
from sparktrain.train.strategies.replicas.flat import Flat, Tile, lengths_of, named
from sparktrain.train.strategies.replicas.local_steps import LocalSteps

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
        sparse = Sparse(flat, compression_chunk, compression_topk, _VALUES[quantize_bits], error_decay)
        self._wire = f"{compression_topk} of {compression_chunk}x{compression_chunk} weights, {quantize_bits} bits"
        super().__init__(
            flat,
            names,
            inner,
            sparse,
            sync_every=sync_every,
            planned_steps=planned_steps,
            exact=require_exact_steps,
            group=process_group,
        )

    def _layout(self) -> str:
        return f"{super()._layout()}, {self._wire}"

    def _move(self, tile: Tile, mean: Tensor) -> None:
        self._flat.shared[tile.weights].add_(mean, alpha=-self.outer_lr)


class Sparse:
    """Contributions that say something of the largest weights only."""

    def __init__(self, flat: Flat, chunk: int, topk: int, values: Values, decay: float) -> None:
        self.residual: Tensor = torch.zeros(flat.weights, device=flat.device)
        self._chunk, self._decay = chunk, decay
        self._code = ChunkCode(chunk * chunk, topk, values)
        most = max(self._chunks(tile.length) for tile in flat.all_tiles())
        self._select = Selector(chunk, chunk, topk, most, flat.device)
        # With one weight more, where absent coefficients go.
        self._tile = torch.zeros(most * chunk * chunk + 1, device=flat.device)

    def write(self, flat: Flat, fragment: int, weight: float) -> tuple[Tensor, bool]:
        parts = [torch.zeros(HEAD, dtype=torch.uint8, device=flat.device)]
        finite = True
        for tile in flat.fragments[fragment]:
            residual, chunks = self.residual[tile.weights], self._chunks(tile.length)
            told = self._tile[: chunks * self._code.area]
            told[tile.length :] = 0
            part = flat.progress(tile, told[: tile.length])
            finite &= is_finite(part)
            part.add_(residual, alpha=self._decay)
            # The selector reads row after row of all chunks; a chunk's weights stay in a row.
            rows = told.view(chunks, self._chunk, self._chunk).transpose(0, 1).contiguous()
            chosen = self._select(rows)
            parts.append(self._code.encode(chosen.indices, chosen.values))
            self._add(parts[-1], chunks, -1.0)
            residual.copy_(part)
        return torch.cat(parts), finite

    def means(self, flat: Flat, fragment: int, received: Received) -> Iterator[tuple[Tile, Tensor]]:
        begin = 0
        for tile in flat.fragments[fragment]:
            chunks = self._chunks(tile.length)
            end = begin + self._code.num_bytes(chunks)
            mean = self._tile[: tile.length].zero_()
            for row, weight in zip(received.data, received.weights, strict=True):
                self._add(row[begin:end], chunks, weight / received.total)
            begin = end
            yield tile, mean

    def _chunks(self, length: int) -> int:
        return -(-length // self._code.area)

    def _add(self, data: Tensor, chunks: int, weight: float) -> None:
        """Add what ``data`` says of a tile, times ``weight``, to ``_tile``."""
        index, value = self._code.decode(data, chunks)
        absent = index == self._code.area
        index = index + self._code.area * torch.arange(chunks, device=index.device).unsqueeze(1)
        index = index.masked_fill_(absent, len(self._tile) - 1)
        self._tile.index_add_(0, index.view(-1), value.reshape(-1), alpha=weight)


def build(
    parameters: dict[str, torch.nn.Parameter], section: Sparseloco, optimizer: Optimizer, steps: int
) -> SparseLoCo:
    trained = [(name, p) for name, p in parameters.items() if p.requires_grad]
    settings = section.model_dump(exclude={"kind"})
    return SparseLoCo(trained, adamw(parameters, optimizer), planned_steps=steps, **settings)


def traffic_per_step(shapes: Sequence[torch.Size], section: Sparseloco, world: int) -> Traffic:
    """The mean over a round; ``sync_every="auto"`` counts as the fewest steps it may choose."""
    chunk = section.compression_chunk
    code = ChunkCode(chunk * chunk, section.compression_topk, _VALUES[section.quantize_bits])
    lengths = lengths_of(sum(shape.numel() for shape in shapes), _tile_weights(chunk, "cpu"))
    traffic = Traffic()
    if world > 1:
        traffic.add_all_gather(HEAD + sum(code.num_bytes(-(-n // code.area)) for n in lengths), world)
    return traffic.per_step(LEAST if section.sync_every == "auto" else section.sync_every)


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
