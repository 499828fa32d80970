"""What a strategy is: that which stands where ``optimizer.step()`` stood.

The loop leaves in each parameter's ``.grad`` this rank's gradient. Whatever share of the batch each rank had, it is
scaled so that its **mean over ranks is the gradient of the global batch's mean token loss**; or, for a strategy whose
ranks take steps of their own (``local``), so that it is **the gradient of the mean loss of this rank's own tokens**: a
step must not be longer because the share is larger, so the share counts when contributions are averaged, by the tokens
that ``step`` was told of. Then, on every rank::

    strategy.average_gradients()    # only all-reduce does something here
    clip(parameters)                # one place for clipping and for noticing a gradient that is not finite
    strategy.step(lr, tokens)

Every strategy keeps parameters bit-identical on all ranks after each sync, aggregates in rank order, works at world
size 1, and is usable without Spark as a plain PyTorch object. A strategy never imports another one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch


@dataclass
class Traffic:
    """What a strategy has communicated so far, counted where it is sent.

    payload_bytes: what this rank contributed, once, however many ranks receive it.
    bytes_sent, bytes_received: what crossed this rank's network interface under the collective's algorithm.
    seconds: time spent waiting for collectives.
    """

    payload_bytes: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0

    def add_ring_all_reduce(self, num_bytes: int, world: int) -> None:
        """A ring all-reduce of ``num_bytes``: each rank passes on 2 (W-1)/W of the buffer."""
        crossed = 2 * num_bytes * (world - 1) // world
        self.payload_bytes += num_bytes
        self.bytes_sent += crossed
        self.bytes_received += crossed

    def add_all_gather(self, num_bytes: int, world: int) -> None:
        """An all-gather where each rank contributes ``num_bytes`` and receives everybody else's."""
        self.payload_bytes += num_bytes
        self.bytes_sent += num_bytes * (world - 1)
        self.bytes_received += num_bytes * (world - 1)

    def per_step(self, steps: int) -> "Traffic":
        """The mean over ``steps``, bytes rounded up."""
        payload, sent, received = (-(-n // steps) for n in (self.payload_bytes, self.bytes_sent, self.bytes_received))
        return Traffic(payload, sent, received, self.seconds / steps)


BYTES = ("payload_bytes", "bytes_sent", "bytes_received")


class Strategy(Protocol):
    """How ranks turn their gradients into shared progress."""

    traffic: Traffic
    local: bool
    refuses: bool
    """Whether it sees for itself, on all ranks together, to gradients that are not finite."""

    @property
    def phases(self) -> Mapping[str, float]:
        """Seconds of the last step in some of ``results.records.PHASES``, by name, where it tells them. "coding" has
        the selection in it where that is not told by itself."""

    @property
    def delta_norm(self) -> float | None:
        """L2 norm of what this rank changed of the parameters in the round that its last step ended; None where that
        step ended none."""

    def average_gradients(self) -> None:
        """Replace ``.grad`` by its mean over ranks, where the strategy needs that before clipping; else nothing."""

    def step(self, lr: float, tokens: int) -> None:
        """Consume ``.grad``, which comes from ``tokens`` predicted tokens of this rank; communicate as needed; update
        the parameters with learning rate ``lr``."""

    def retune(self, optimizer: Any, section: Any) -> None:
        """Go on with these settings, of which those that fix layouts are as before."""

    def sync(self) -> None:
        """Bring every rank to the same parameters: before evaluation, export and the end. Training goes on from
        where it leaves them."""

    def extract(self) -> dict[str, torch.Tensor]:
        """The weights that all ranks share, by name, as a checkpoint or a reader should see them now: not copies, no
        communication. Between two syncs these may be others than the parameters that this rank is training."""

    def state_dict(self) -> dict[str, Any]:
        """Complete state to resume from, at any step: ``{"shared": the same on every rank, "rank": this rank's own}``,
        trees of dictionaries, lists, tuples, plain values and tensors. No communication."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, with the parameters at what :meth:`extract` gave. ``state["rank"]`` is None on
        a rank that the saved world did not have; what happens then is each strategy's rule."""


def told(strategy: Strategy, moved: Mapping[str, float], skipped: bool) -> dict[str, Any]:
    """What the record of a step has of its strategy, of whose traffic it ``moved`` so much."""
    phases = {} if skipped else strategy.phases
    numbers = {name: int(moved[name]) for name in BYTES} | {"delta_norm": strategy.delta_norm}
    return numbers | {f"{name}_seconds": seconds for name, seconds in phases.items()}


class StrategyKind(NamedTuple):
    """A row of the strategy table.

    build: ``(parameters by name, strategy section, optimizer section, planned steps) -> Strategy``.
    traffic_per_step: ``(parameter shapes, strategy section, world size, bytes of a parameter) -> Traffic`` of one step;
    where a strategy does not communicate in every step, the mean over those of a round, rounded up.
    """

    build: Callable[[dict[str, torch.nn.Parameter], Any, Any, int], Strategy]
    traffic_per_step: Callable[[Sequence[torch.Size], Any, int, int], Traffic]
