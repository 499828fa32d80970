"""DiLoCo: every rank takes H steps of its own, then all move by the mean of their progress (arXiv 2311.08105).

The progress ``D = theta - x`` of a round is a gradient to an outer SGD, by default with Nesterov momentum::

    v = momentum * v + D
    theta = theta - outer_lr * (D + momentum * v)          without nesterov: theta - outer_lr * v

to the bit what ``torch.optim.SGD`` makes of it. ``outer_lr=1, outer_momentum=0, nesterov=False`` is the average of the
ranks' parameters. Momentum remembers ten rounds and multiplies progress by seven: it is for runs of hundreds of rounds,
and does harm in shorter ones. In a world of one rank this is lookahead.

``compression`` is of the progress that is sent: "bf16", "int8", "int4" by all-gather, none by an all-reduce of
float32, of which a rank receives 2 (W-1)/W; so bf16 is for fewer than 4 ranks, int8 for fewer than 8, int4 for fewer
than 16. int4 is sent with error feedback: what coding took from a contribution is added to the next.

``num_fragments``, ``fragment_sync_delay`` and ``fragment_update_alpha`` are those of torchft and Streaming DiLoCo
(arXiv 2501.18512): fragments take turns, one every H / P steps, so that the largest message is a P-th; contributions
leave so many steps early and travel meanwhile; and a rank keeps so much of its own when it takes the shared
parameters. What a rank learns in the steps of the delay it keeps by ``alpha`` alone.

What a round, ``sync()`` and the state are is in ``replicas/local_steps.py``. Memory: a float32 per weight and one for
momentum; without compression a message of float32; with int4 one more for feedback.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from sparktrain.config import Diloco, Optimizer
from sparktrain.errors import ConfigError
from sparktrain.train.compression.vector_code import Codec
from sparktrain.train.strategies.contract import Traffic
from sparktrain.train.strategies.inner import adamw, retune
from sparktrain.train.strategies.replicas.cadence import Bounds, Every, first_every
from sparktrain.train.strategies.replicas.dense import TILE_WEIGHTS, Dense, message_bytes
from sparktrain.train.strategies.replicas.flat import Flat, Tile, bounds_of, named
from sparktrain.train.strategies.replicas.local_steps import LocalSteps

_CODECS: dict[str | None, Codec | None] = {None: None, "none": None, "bf16": "bf16", "int8": "int8", "int4": "int4"}
# A run of a few hundred steps hardly gains from other ranks if they meet ten times only.
BOUNDS = Bounds(steps=10, rounds=30)
# Fewer rounds than this are averaged by ``outer="auto"``. In 100 rounds of 10 steps momentum lost to a rank that
# trained alone (benchmarks/results); those who report that it wins had several hundred.
ROUNDS_FOR_MOMENTUM = 500


class DiLoCo(LocalSteps):
    """See the module; a plain PyTorch object, with or without a process group::

        outer = DiLoCo(model.parameters(), torch.optim.AdamW(model.parameters()), sync_every=50)
        loss.backward(); outer.step(tokens=n)        # in place of the inner optimizer's step
        outer.sync()                                 # before the parameters are read

    Args:
        params: parameters that are shared: those of ``inner``, with gradient or without.
        inner: takes this rank's steps.
        sync_every: H, or "auto", see ``replicas/cadence.py``.
        outer_lr, outer_momentum, nesterov: of the outer SGD.
        compression: "bf16", "int8", "int4" or none.
        num_fragments: P; must divide H.
        fragment_sync_delay: steps a contribution travels; fewer than H / P.
        fragment_update_alpha: part of its own a rank keeps, in [0, 1].
        process_group: ranks to train with; none: all, or this process where torch.distributed is not in use.
        outer: "sgd"; "average": SGD with lr 1 and no momentum; "auto": average where fewer than 500 rounds are planned,
            and while ``sync_every="auto"`` is measuring, else sgd.
        planned_steps: of the run, for what is "auto"; 0: unknown, but many.
        require_exact_steps: a rank that comes to a sync with another number of steps is an error.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        inner: torch.optim.Optimizer,
        *,
        sync_every: Every,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        compression: str | None = None,
        num_fragments: int = 1,
        fragment_sync_delay: int = 0,
        fragment_update_alpha: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
        outer: Literal["sgd", "average", "auto"] = "sgd",
        planned_steps: int = 0,
        require_exact_steps: bool = True,
    ) -> None:
        _check(outer_lr, outer_momentum, nesterov, compression, num_fragments, fragment_update_alpha)
        names, parameters = named(params)
        tile = TILE_WEIGHTS.get(parameters[0].device.type if parameters else "cpu", TILE_WEIGHTS["cuda"])
        flat = Flat(parameters, num_fragments, tile)
        self.codec = _CODECS[compression]
        super().__init__(
            flat,
            names,
            inner,
            Dense(flat, self.codec, feedback=self.codec == "int4"),
            sync_every=sync_every,
            bounds=BOUNDS,
            planned_steps=planned_steps,
            delay=fragment_sync_delay,
            alpha=fragment_update_alpha,
            exact=require_exact_steps,
            group=process_group,
        )
        interval = self.cadence.every // num_fragments
        if not 0 <= fragment_sync_delay < interval:
            raise ConfigError(
                f"fragment_sync_delay is {fragment_sync_delay}, but a fragment is synchronised every {interval} steps "
                f"(sync_every / num_fragments): set it to at most {interval - 1}"
            )
        self.outer = outer
        self.outer_lr, self.outer_momentum, self.nesterov = outer_lr, outer_momentum, nesterov
        self._averages = outer != "sgd"
        self._velocity: torch.Tensor | None = None

    def retune(self, optimizer: Optimizer, section: Diloco) -> None:
        retune(self.optimizer, optimizer)
        self.outer_lr, self.outer_momentum = section.outer_lr, section.outer_momentum

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["shared"] |= {"averages": self._averages, "velocity": self._velocity}
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        velocity = state_dict["shared"]["velocity"]
        self._velocity = None if velocity is None else velocity.to(self._flat.device, copy=True)
        self._averages = state_dict["shared"]["averages"]

    def _layout(self) -> str:
        return f"{super()._layout()}, compression {self.codec or 'none'}"

    def _rules(self) -> str:
        outer = f"outer {self.outer}, lr {self.outer_lr}, momentum {self.outer_momentum}, nesterov {self.nesterov}"
        return f"{super()._rules()}, {outer}, planned_steps {self.cadence.planned_steps}"

    def _move(self, tile: Tile, mean: torch.Tensor) -> None:
        theta = self._flat.shared[tile.weights]
        lr, momentum = (1.0, 0.0) if self._averages else (self.outer_lr, self.outer_momentum)
        if momentum:
            if self._velocity is None:
                self._velocity = torch.zeros(self._flat.weights, device=self._flat.device)
            velocity = self._velocity[tile.weights].mul_(momentum).add_(mean)
            mean = mean.add_(velocity, alpha=momentum) if self.nesterov else velocity
        theta.add_(mean, alpha=-lr)

    def _settle(self, reason: str) -> None:
        if self.outer == "auto":
            rounds = self.cadence.planned_steps // self.cadence.every
            self._averages = self.cadence.planned_steps > 0 and rounds < ROUNDS_FOR_MOMENTUM
            chosen = "average" if self._averages else f"SGD, lr {self.outer_lr}, momentum {self.outer_momentum}"
            planned = f"{rounds} rounds are planned" if self.cadence.planned_steps else "no number of rounds is known"
            reason += f"{'; ' if reason else ''}outer {chosen}: {planned}, and momentum needs {ROUNDS_FOR_MOMENTUM}"
        world, lengths = self._exchange.world, [self._flat.length(f) for f in range(len(self._flat.fragments))]
        coded, whole = (sum(message_bytes(codec, n) for n in lengths) for codec in (self.codec, None))
        if self.codec and (world - 1) * coded > 2 * whole * (world - 1) // world:
            reason += f"{'; ' if reason else ''}compression {self.codec} brings each of {world} ranks more bytes than "
            reason += "an all-reduce of float32 would: set compression to none"
        super()._settle(reason)


def build(parameters: dict[str, torch.nn.Parameter], section: Diloco, optimizer: Optimizer, steps: int) -> DiLoCo:
    trained = [(name, p) for name, p in parameters.items() if p.requires_grad]
    settings = section.model_dump(exclude={"kind"})
    return DiLoCo(trained, adamw(parameters, optimizer), planned_steps=steps, **settings)


def traffic_per_step(shapes: Sequence[torch.Size], section: Diloco, world: int, element_bytes: int = 4) -> Traffic:
    """The mean over a round; ``sync_every="auto"`` counts as the fewest steps it may choose."""
    weights = sum(shape.numel() for shape in shapes)
    fragments, codec = section.num_fragments, _CODECS[section.compression]
    every = first_every(section.sync_every, fragments, BOUNDS)
    bounds, traffic = bounds_of(weights, fragments), Traffic()
    for begin, end in itertools.pairwise(bounds):
        size = message_bytes(codec, end - begin)
        if world > 1 and codec is None:
            traffic.add_ring_all_reduce(size, world)
        elif world > 1:
            traffic.add_all_gather(size, world)
    return traffic.per_step(every)


def _check(lr: float, momentum: float, nesterov: bool, compression: str | None, fragments: int, alpha: float) -> None:
    """``ConfigError`` naming the setting that is out of range."""
    if not 0 < lr < float("inf"):
        raise ConfigError(f"outer_lr is {lr}: expected a number above 0")
    if not 0 <= momentum < 1:
        raise ConfigError(f"outer_momentum is {momentum}: expected a number in [0, 1)")
    if nesterov and momentum == 0:
        raise ConfigError("nesterov is on but outer_momentum is 0: set outer_momentum above 0, or nesterov to false")
    if compression not in _CODECS:
        raise ConfigError(f"compression is {compression!r}: expected none, bf16, int8 or int4")
    if fragments < 1:
        raise ConfigError(f"num_fragments is {fragments}: expected at least 1")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"fragment_update_alpha is {alpha}: expected a number in [0, 1]")
