"""DisTrO: train with one small packed message per step and rank (DeMo, arXiv 2411.19870).

Each rank accumulates its gradient in a momentum that is never synchronised. Per chunk of 64x64 weights it sends the
k largest coefficients of that momentum's discrete cosine transform and forgets them; all ranks average what all
ranks sent, transform back, and move every weight by the sign of the result::

    M = decay * M + lr * D(gradient)        D: the 2-D DCT of each chunk; M lives in the DCT domain
    I = the k largest |M| of each chunk     sent: I and M[I]; then M[I] = 0
    Q = mean over the ranks that sent a coefficient
    x = x * (1 - lr * weight_decay) - lr * sign(D^-1(Q))

Whole 64x64 chunks are cut from the matrices; what does not fill a chunk, and all small tensors, are strung together
per parameter group and cut into chunks of the same area, so no dimension is bad: N weights are ceil(N / 4096) chunks.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparktrain.config import Distro, Optimizer
from sparktrain.train.compression.dct import dct_matrix
from sparktrain.train.strategies.contract import Traffic


class DisTrO(torch.optim.Optimizer):
    """See the module; usable as a plain PyTorch optimizer, with or without a process group.

    Args:
        params: parameters or groups of them; ``lr`` and ``weight_decay`` may differ by group.
        lr: every weight moves by exactly this much per step.
        compression_decay: of the momentum, in [0, 1].
        compression_topk: coefficients sent per chunk.
        compression_chunk: edge of a chunk.
        process_group: ranks to train with; none: all, or this process alone where torch.distributed is not in use.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        compression_decay: float = 0.999,
        compression_topk: int = 32,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 <= compression_decay <= 1:
            raise ValueError(f"compression_decay is {compression_decay}: expected a number in [0, 1]")
        if compression_chunk < 1 or not 1 <= compression_topk <= compression_chunk**2:
            raise ValueError(
                f"compression_topk is {compression_topk}, compression_chunk {compression_chunk}: expected a chunk "
                f"of at least 1 and 1 <= topk <= chunk^2"
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.decay, self.topk, self.chunk = compression_decay, compression_topk, compression_chunk
        self.traffic = Traffic()
        self._group = process_group
        self._world = dist.get_world_size(process_group) if dist.is_initialized() else 1
        self._momentum = [
            torch.zeros(num_chunks(_numel(group["params"]), self.chunk), self.chunk, self.chunk)
            for group in self.param_groups
        ]

    def average_gradients(self) -> None:
        """Nothing: every rank keeps its own gradient."""

    def sync(self) -> None:
        """Nothing: every step leaves the same parameters on every rank."""

    @torch.no_grad()
    def step(self, lr: float | None = None) -> None:  # type: ignore[override]
        """One update of all parameters; ``lr`` overrides that of every group."""
        if lr is not None:
            for group in self.param_groups:
                group["lr"] = lr
        basis = dct_matrix(self.chunk)
        sent = []
        for group, momentum in zip(self.param_groups, self._momentum, strict=True):
            gradient = torch.zeros_like(momentum)
            for parameter, chunks in _chunks(group["params"], gradient):
                if parameter.grad is not None:
                    for region, chunk in chunks(parameter.grad):
                        chunk.copy_(region)
            momentum.mul_(self.decay).add_(basis.T @ gradient @ basis, alpha=group["lr"])
            flat = momentum.view(len(momentum), -1)
            index = flat.abs().topk(self.topk, sorted=False).indices
            sent.append(_to_bytes(index, flat.gather(1, index)))
            flat.scatter_(1, index, 0)
        received = self._gather(torch.cat(sent))
        begin = 0
        for group, momentum, own in zip(self.param_groups, self._momentum, sent, strict=True):
            everyones = received[:, begin : begin + len(own)]
            begin += len(own)
            mean = self._mean(everyones, len(momentum)).view_as(momentum)
            step = (basis @ mean @ basis.T).sign_()
            for parameter, chunks in _chunks(group["params"], step):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                for region, chunk in chunks(parameter):
                    region.sub_(chunk, alpha=group["lr"])

    def _gather(self, payload: Tensor) -> Tensor:
        everyones = torch.empty(self._world * len(payload), dtype=torch.uint8)
        began = time.perf_counter()
        if self._world > 1:
            dist.all_gather_into_tensor(everyones, payload, group=self._group)
        else:
            everyones.copy_(payload)
        self.traffic.seconds += time.perf_counter() - began
        self.traffic.add_all_gather(len(payload), self._world)
        return everyones.view(self._world, -1)

    def _mean(self, everyones: Tensor, chunks: int) -> Tensor:
        """Mean over contributors, summed in rank order so that every rank gets the same bits."""
        total = torch.zeros(chunks, self.chunk**2)
        count = torch.zeros_like(total)
        for payload in everyones:
            index, value = _from_bytes(payload, chunks, self.topk)
            total.scatter_add_(1, index, value)
            count.scatter_add_(1, index, torch.ones_like(value))
        return total.div_(count.clamp_(min=1))


def num_chunks(numel: int, chunk: int) -> int:
    """Chunks that so many weights of one parameter group fill."""
    return -(-numel // chunk**2)


def _numel(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _chunks(parameters: Sequence[Tensor], storage: Tensor) -> Iterator[tuple[Tensor, Any]]:
    """For each parameter, a function from a tensor of its shape to pairs of (region of it, its part of storage)."""
    chunk = storage.shape[-1]
    whole, stray = 0, sum(_whole_chunks(p, chunk) for p in parameters) * chunk**2

    for parameter in parameters:
        rows, columns = _edges(parameter)
        y, x = rows // chunk, columns // chunk
        right, bottom = y * chunk * (columns - x * chunk), (rows - y * chunk) * columns
        grid = storage[whole : whole + y * x].view(y, x, chunk, chunk).permute(0, 2, 1, 3)
        edge = storage.view(-1)[stray : stray + right].view(y * chunk, columns - x * chunk)
        foot = storage.view(-1)[stray + right : stray + right + bottom].view(rows - y * chunk, columns)
        whole, stray = whole + y * x, stray + right + bottom

        def pairs(
            tensor: Tensor, grid: Tensor = grid, edge: Tensor = edge, foot: Tensor = foot
        ) -> list[tuple[Tensor, Tensor]]:
            matrix = tensor.view(_edges(tensor))
            top, side = grid.shape[0] * grid.shape[1], grid.shape[2] * grid.shape[3]
            return [
                (matrix[:top, :side].as_strided(grid.shape, _strides(matrix, grid.shape)), grid),
                (matrix[:top, side:], edge),
                (matrix[top:], foot),
            ]

        yield parameter, pairs


def _strides(matrix: Tensor, grid: torch.Size) -> tuple[int, ...]:
    row, column = matrix.stride()
    return (row * grid[1], row, column * grid[3], column)


def _edges(tensor: Tensor) -> tuple[int, int]:
    columns = tensor.shape[-1] if tensor.ndim else 1
    return tensor.numel() // max(columns, 1), columns


def _whole_chunks(tensor: Tensor, chunk: int) -> int:
    rows, columns = _edges(tensor)
    return (rows // chunk) * (columns // chunk)


def _to_bytes(index: Tensor, value: Tensor) -> Tensor:
    # gloo refuses int16: everything is bytes.
    return torch.cat([index.to(torch.int16).view(torch.uint8).flatten(), value.view(torch.uint8).flatten()])


def _from_bytes(payload: Tensor, chunks: int, topk: int) -> tuple[Tensor, Tensor]:
    split = 2 * chunks * topk
    index = payload[:split].clone().view(torch.int16).view(chunks, topk)
    return index.long(), payload[split:].clone().view(torch.float32).view(chunks, topk)


def build(parameters: dict[str, torch.nn.Parameter], section: Distro, optimizer: Optimizer) -> DisTrO:
    trained = list({id(p): p for p in parameters.values() if p.requires_grad}.values())
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optimizer.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return DisTrO(
        [group for group in groups if group["params"]],
        optimizer.lr,
        compression_decay=section.compression_decay,
        compression_topk=section.compression_topk,
        compression_chunk=section.compression_chunk,
    )


def traffic_per_step(shapes: Sequence[torch.Size], section: Distro, world: int) -> Traffic:
    traffic = Traffic()
    for group in ([s for s in shapes if len(s) >= 2], [s for s in shapes if len(s) < 2]):
        chunks = num_chunks(sum(shape.numel() for shape in group), section.compression_chunk)
        traffic.add_all_gather(6 * section.compression_topk * chunks, world)
    return traffic
