"""DisTrO: train with one small packed message per step and rank.

Each rank accumulates its gradient in a momentum that is never synchronised. Per chunk of 64 x 64 weights it sends the
k largest coefficients of that momentum's discrete cosine transform D and forgets them; all ranks average what all
ranks sent, transform back, and move every weight by the sign of the result (DeMo, arXiv 2411.19870)::

    M = decay * (M - what was sent) + lr * D(gradient)     M lives in the DCT domain
    send the k largest |M| of each chunk
    Q = mean over the ranks that sent a coefficient, added up in rank order
    x = x * (1 - lr * weight_decay) - lr * sign(D^-1(Q))

``overlap=True`` is Psyche's form. The messages of a step travel during the next forward and backward pass and are
applied after it; what was sent leaves M when they have arrived; and gradients are taken at a look-ahead point, where
each rank stands ``lr * sign(D^-1(M))`` further on, by itself. ``sync()`` takes the look-ahead back: call it before you
read the weights, ``look_ahead()`` before you go on.

What counts as a contribution. A coefficient that is zero is not sent. A chunk none of whose weights had a gradient on
a rank rests there, momentum and all. A parameter without a gradient on any rank is not moved. If any rank's gradient
holds an infinity or a NaN, no rank moves anything: that rank drops its gradient, the others keep theirs in the
momentum, and what they sent stays to be sent again.

State and world size. Parameters, their bfloat16 rests, messages under way and counters are the same everywhere; the
momentum is each rank's own. In a world of another size, rank r takes the state of old rank r; a rank that has none
takes the shared part of any and starts with a momentum of zero; the momentum of ranks that are gone, gradient that
was never sent, is lost.

Memory: a float32 per weight and some megabytes; two bytes more per bfloat16 weight; with ``overlap`` a copy of the
parameters; while messages are applied, 8 bytes per coefficient received.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparktrain.config import Distro, Optimizer
from sparktrain.errors import ConfigError
from sparktrain.results.records import PHASES
from sparktrain.train.compression.wire import Values
from sparktrain.train.strategies.distro import checks as checks
from sparktrain.train.strategies.distro import message as message
from sparktrain.train.strategies.distro.exchange import Exchange
from sparktrain.train.strategies.distro.layout import Cut, layout_of
from sparktrain.train.strategies.distro.tiles import Seconds, Tiles
from sparktrain.train.strategies.distro.updates import Updates
from sparktrain.train.strategies.distro.weights import Weights

TILE_WEIGHTS = {"cpu": 64 * 4096, "cuda": 512 * 4096}


class DisTrO(torch.optim.Optimizer):
    """See the module; a plain PyTorch optimizer, with or without a process group.

    Args:
        params: parameters or groups of them, named or not; ``lr`` and ``weight_decay`` may differ by group.
        lr: every weight moves by this much per step: a quarter to a half of AdamW's is a start.
        compression_decay: of the momentum, in [0, 1]; 0.95 to 0.98 for runs of some hundred steps.
        compression_topk: coefficients sent per chunk.
        compression_chunk: edge of a chunk.
        weight_decay: decoupled.
        quantize_1bit: send signs of coefficients only: ``values="1bit"``.
        overlap: Psyche's form, see the module.
        process_group: ranks to train with; none: all, or this process where torch.distributed is not in use.
        values: how coefficients are sent, see ``wire``.
        cut: how chunks are cut, "padded" or Psyche's "divisor", see ``layout.py``.
        verify_every: compare a digest of the parameters over ranks every so many steps; 0: in ``sync()`` only. A run
            compares at each checkpoint, whatever the strategy.
        max_refused: stop after so many steps in a row with gradients that are not finite.
    """

    refuses = True

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        compression_decay: float = 0.999,
        compression_topk: int = 32,
        compression_chunk: int = 64,
        weight_decay: float = 0.0,
        quantize_1bit: bool = False,
        overlap: bool = False,
        process_group: dist.ProcessGroup | None = None,
        values: Values = "fp32",
        cut: Cut = "padded",
        verify_every: int = 0,
        max_refused: int = 10,
    ) -> None:
        checks.check_settings(compression_decay, compression_topk, compression_chunk, lr, weight_decay, values)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.values: Values = "1bit" if quantize_1bit else values
        self.compression_decay, self.overlap, self.verify_every = compression_decay, overlap, verify_every
        self._layout = f"compression_topk {compression_topk}, compression_chunk {compression_chunk}, cut {cut}"
        self._layout += f", values {self.values}, overlap {overlap}"
        self._rules = f"compression_decay {compression_decay}, verify_every {verify_every}, max_refused {max_refused}"
        self.numbers = message.Numbers()
        self.steps, self.local, self.delta_norm = 0, False, None
        self._parameters: list[Tensor] = [p for group in self.param_groups for p in group["params"]]
        self._names = checks.names_of(self.param_groups)
        checks.check_parameters(self._names, self._parameters)
        device, shapes = self._parameters[0].device, [[p.shape for p in g["params"]] for g in self.param_groups]
        tile = TILE_WEIGHTS.get(device.type, TILE_WEIGHTS["cuda"])
        layout = layout_of(shapes, compression_chunk, compression_topk, self.values, cut, tile)
        self._tiles = Tiles(layout, device)
        self._weights = Weights(self._parameters, self._tiles)
        self._exchange = Exchange(process_group, device)
        self.traffic = self._exchange.traffic
        self._updates = Updates(self._tiles, self.values, self._names, max_refused, overlap)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_tiles"):
            raise ConfigError("DisTrO's layout is fixed once it is made: give all parameter groups at the start")
        super().add_param_group(param_group)

    def average_gradients(self) -> None:
        """Nothing: each rank keeps its own."""

    @torch.no_grad()
    def step(self, lr: float | None = None, tokens: int | None = None) -> None:  # type: ignore[override]
        """One update of all parameters; ``lr`` overrides that of every group. Every rank must call it."""
        self._set_lr(lr)
        self._weights.restore()
        self._tiles.seconds, self._exchange.seconds = Seconds(), 0.0
        if not self._exchange.agreed:
            tensors = checks.describe(self.param_groups, self._names)
            gradient_bytes = sum(p.nbytes for p in self._parameters)
            self._exchange.agree(tensors, f"{self._layout}, {self._rules}", self._payload_bytes, gradient_bytes)
        if self.overlap:
            messages = self._exchange.messages()
            said = None if messages is None else self._updates.read(messages, self.steps)
            self._exchange.start(self._train())
            self._move(said) if messages is not None else self._weights.decay(self.param_groups)
            self.look_ahead()
        else:
            self._exchange.start(self._train())
            messages = self._exchange.messages()
            self._exchange.resume(None)
            self._move(None if messages is None else self._updates.read(messages, self.steps))
        self.steps += 1
        self._tiles.seconds.communication = self._exchange.seconds
        weights = sum(p.numel() for p in self._parameters)
        self.numbers = message.numbers_of(self._payload_bytes, weights, self._exchange.world, self._tiles.seconds)

    @torch.no_grad()
    def sync(self) -> None:
        """Take the look-ahead back and compare parameters over ranks; ``Diverged`` names the ranks that differ.
        With ``overlap`` the last messages stay under way: the next step applies them."""
        self._weights.restore()
        self._exchange.verify(self._weights.digest(), self.steps)

    @torch.no_grad()
    def look_ahead(self) -> None:
        """With ``overlap``: go to where the next gradient is to be taken. ``step()`` ends with it."""
        if self.overlap and not self._weights.ahead:
            self._weights.look_ahead([group["lr"] for group in self.param_groups])

    @torch.no_grad()
    def train(self, lr: float | None = None) -> bytes:
        """Take the gradients into the momentum; this rank's update, for a transport of your own to carry."""
        self._set_lr(lr)
        self._weights.restore()
        return self._train().cpu().numpy().tobytes()

    @torch.no_grad()
    def optimize(self, updates: Sequence[bytes], lr: float | None = None) -> None:
        """Apply the updates of all ranks, in the same order everywhere. ``ValueError`` where one is damaged."""
        self._set_lr(lr)
        self._weights.restore()
        for i, update in enumerate(updates):
            if len(update) != self._payload_bytes:
                raise ValueError(f"update {i} has {len(update)} bytes, expected {self._payload_bytes}")
        rows = [torch.frombuffer(bytearray(update), dtype=torch.uint8) for update in updates]
        if rows:
            self._move(self._updates.read(torch.stack(rows).to(self._tiles.device), self.steps))

    def retune(self, optimizer: Optimizer, section: Distro) -> None:
        for group in self.param_groups:
            group["weight_decay"] = optimizer.weight_decay if group["params"][0].ndim >= 2 else 0.0
        self.compression_decay = section.compression_decay

    def extract(self) -> dict[str, Tensor]:
        """The weights by name, without look-ahead: not copies."""
        return {name: t.detach() for name, t in zip(self._names, self._weights.current(), strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """``{"shared": the same on every rank, "rank": this rank's own}``; not copies. See the module."""
        shared = {
            "layout": self._layout,
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
            "counters": [self.steps, self._updates.refused, self._updates.refused_in_a_row],
            "rests": {self._names[number]: rest for number, rest in self._weights.rests.items()},
            "under_way": self._exchange.messages(),
        }
        return {"shared": shared, "rank": self._updates.state()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; without a "rank" part, from a momentum of zero. Load parameters first."""
        if (shared := state_dict["shared"])["layout"] != self._layout:
            raise ConfigError(f"state was saved with {shared['layout']}, this run has {self._layout}: use the same")
        for group, settings in zip(self.param_groups, shared["param_groups"], strict=True):
            group.update(settings)
        self.steps, self._updates.refused, self._updates.refused_in_a_row = shared["counters"]
        for number, rest in self._weights.rests.items():
            rest.copy_(shared["rests"][self._names[number]])
        self._exchange.resume(shared["under_way"])
        self._updates.load(state_dict.get("rank"))
        self.look_ahead()

    def _train(self) -> Tensor:
        due = self.verify_every and self.steps % self.verify_every == 0
        digest = self._weights.digest() if due else 0
        gradients, rates = [p.grad for p in self._parameters], [group["lr"] for group in self.param_groups]
        return self._updates.make(gradients, self.compression_decay, rates, digest)

    def _move(self, said: message.Said | None) -> None:
        if said is None:
            return
        began = time.perf_counter()
        self._weights.apply(self._tiles.directions(said.chosen), said.moved, self.param_groups)
        self._tiles.seconds.apply += time.perf_counter() - began

    def _set_lr(self, lr: float | None) -> None:
        for group in self.param_groups:
            group["lr"] = group["lr"] if lr is None else lr

    @property
    def phases(self) -> dict[str, float]:
        """See the strategy contract."""
        return {name: getattr(self.numbers.seconds, name) for name in PHASES}

    @property
    def refused(self) -> int:
        """Steps that were not taken because a gradient was not finite."""
        return self._updates.refused

    @property
    def _payload_bytes(self) -> int:
        return self._tiles.layout.payload_bytes(self.values)
