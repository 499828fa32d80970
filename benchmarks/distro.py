"""What a DisTrO step costs: CPU seconds on one thread, side by side with the paper done per tensor, and with AdamW.

    python benchmarks/distro.py [--steps 5] [--topk 32 8]

``per tensor`` is the straightforward implementation: the formulas of arXiv 2411.19870 one parameter at a time, with
the momentum in weight space. Rows alternate in one process, so that the machine's other load hits all alike; the
figure is the median. Extra memory is measured in a process of its own.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from sparktrain.train.compression.dct import dct_matrix
from sparktrain.train.strategies.distro import DisTrO

HIDDEN, FEED_FORWARD, LAYERS, VOCABULARY = 512, 1408, 8, 16000


def llama_shapes() -> list[tuple[int, ...]]:
    """A small Llama with tied embeddings: 33.9 M parameters."""
    layer = [(HIDDEN, HIDDEN)] * 4 + [(FEED_FORWARD, HIDDEN)] * 2 + [(HIDDEN, FEED_FORWARD), (HIDDEN,), (HIDDEN,)]
    return [(VOCABULARY, HIDDEN), *layer * LAYERS, (HIDDEN,)]


def parameters_with_gradients() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in llama_shapes()]
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return parameters


class PerTensor:
    """DeMo as the paper writes it, one tensor after the other; alone, so what is gathered is what was sent."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, topk: int, decay: float = 0.999) -> None:
        self.parameters, self.lr, self.topk, self.decay = parameters, lr, topk, decay
        self.momentum = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        for parameter, momentum in zip(self.parameters, self.momentum, strict=True):
            assert parameter.grad is not None
            momentum.mul_(self.decay).add_(parameter.grad, alpha=self.lr)
            encoded = self._encode(momentum)
            flat = encoded.reshape(-1, encoded.shape[-1] * (encoded.shape[-2] if encoded.ndim == 4 else 1))
            index = flat.abs().topk(min(self.topk, flat.shape[1]), sorted=False).indices
            value = flat.gather(1, index)
            momentum.sub_(self._decode(self._dense(index, value, flat), encoded.shape, parameter.shape))
            everyones_index, everyones_value = torch.cat([index], 1), torch.cat([value], 1)
            mean = self._dense(everyones_index, everyones_value, flat)
            parameter.sub_(self._decode(mean, encoded.shape, parameter.shape).sign_(), alpha=self.lr)

    @staticmethod
    def _dense(index: Tensor, value: Tensor, like: Tensor) -> Tensor:
        return torch.zeros_like(like).scatter_reduce_(1, index, value, "mean", include_self=False)

    def _encode(self, x: Tensor) -> Tensor:
        if x.ndim == 1:
            n = _divisor(x.shape[0])
            return torch.einsum("xw,wd->xd", x.view(-1, n), dct_matrix(n))
        h, w = _divisor(x.shape[0]), _divisor(x.shape[1])
        blocks = x.view(x.shape[0] // h, h, x.shape[1] // w, w)
        return torch.einsum("yhxw,hb,wd->yxbd", blocks, dct_matrix(h), dct_matrix(w))

    def _decode(self, flat: Tensor, encoded: torch.Size, shape: torch.Size) -> Tensor:
        c = flat.view(encoded)
        if c.ndim == 2:
            return torch.einsum("xd,wd->xw", c, dct_matrix(c.shape[1])).reshape(shape)
        return torch.einsum("yxbd,hb,wd->yhxw", c, dct_matrix(c.shape[2]), dct_matrix(c.shape[3])).reshape(shape)


def _divisor(size: int, limit: int = 64) -> int:
    return next(d for d in range(min(size, limit), 0, -1) if size % d == 0)


def cpu_seconds(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def compare(topk: int, steps: int) -> None:
    """One table: nanoseconds of CPU per parameter and step, and ratios."""
    weights = sum(p.numel() for p in parameters_with_gradients())
    distro = DisTrO(parameters_with_gradients(), 1e-3, compression_topk=topk)
    one_bit = DisTrO(parameters_with_gradients(), 1e-3, compression_topk=topk, quantize_1bit=True)
    per_tensor = PerTensor(parameters_with_gradients(), 1e-3, topk)
    adamw = torch.optim.AdamW(parameters_with_gradients(), lr=1e-3, fused=True)
    rows = {"DisTrO": distro.step, "DisTrO 1bit": one_bit.step, "per tensor": per_tensor.step, "AdamW": adamw.step}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(steps + 2):
        for name, step in rows.items():
            seconds = cpu_seconds(step)
            if number >= 2:
                times[name].append(seconds)
    nanoseconds = {name: 1e9 * statistics.median(values) / weights for name, values in times.items()}
    print(f"\n{weights / 1e6:.1f} M parameters, k = {topk}, one thread, median of {steps} steps")
    for name, value in nanoseconds.items():
        against = f"{nanoseconds['per tensor'] / value:5.2f} x cheaper than per tensor, " if "DisTrO" in name else ""
        print(f"  {name:12s} {value:6.2f} ns/parameter  {against}{value / nanoseconds['AdamW']:5.2f} x AdamW")
    for name, optimizer in (("DisTrO", distro), ("DisTrO 1bit", one_bit)):
        parts = vars(optimizer.numbers.seconds).items()
        shares = ", ".join(f"{part} {1e9 * seconds / weights:.2f}" for part, seconds in parts)
        print(f"  {name} by part, wall ns/parameter: {shares}; payload {optimizer.numbers.payload_bytes} bytes")


def _peak_extra(topk: int, overlap: bool, pipe: Connection) -> None:
    torch.set_num_threads(1)
    parameters = parameters_with_gradients()
    small = torch.nn.Parameter(torch.zeros(64, 64))
    small.grad = torch.ones_like(small)
    for form in (False, True):  # the libraries' own pages are not the optimizer's memory
        DisTrO([small], 1e-3, compression_topk=topk, overlap=form).step()
    # Forget the peak of what was done to get here; Linux only.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    optimizer = DisTrO(parameters, 1e-3, compression_topk=topk, overlap=overlap)
    for _ in range(3):
        optimizer.step()
    pipe.send((_status("VmHWM") - before, sum(p.numel() for p in parameters) * 4 / 2**20))


def _status(key: str) -> float:
    """MiB of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def memory(topk: int, overlap: bool) -> None:
    """Peak memory beyond parameters and gradients."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_peak_extra, args=(topk, overlap, theirs))
    process.start()
    extra, copy = ours.recv()
    process.join()
    form = "overlapped" if overlap else "synchronous"
    print(f"  peak extra memory, {form}: {extra:.0f} MiB = one float32 copy ({copy:.0f} MiB) + {extra - copy:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--topk", type=int, nargs="+", default=[32, 8])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for topk in arguments.topk:
        compare(topk, arguments.steps)
        for overlap in (False, True):
            memory(topk, overlap)


if __name__ == "__main__":
    main()
