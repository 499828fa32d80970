"""Rounds of steps by oneself: who counts them, when ranks meet, and what each tells the others then."""

import functools
import math
import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from sparktrain.errors import ConfigError
from sparktrain.train.strategies.contract import Traffic
from sparktrain.train.strategies.replicas import agreement
from sparktrain.train.strategies.replicas.cadence import Bounds, Cadence, Every
from sparktrain.train.strategies.replicas.dense import Contribution
from sparktrain.train.strategies.replicas.exchange import Exchange, Head, Received
from sparktrain.train.strategies.replicas.flat import Flat, Tile
from sparktrain.train.strategies.replicas.tally import Tally


class Inner(Protocol):
    """What takes the steps of a rank, as far as a checkpoint goes: a ``torch.optim.Optimizer``, or a program."""

    def state_dict(self) -> dict[str, Any]:
        """With what it remembers under "state", which is {} where that is nothing."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class Rounds:
    """What ``theta``, ``delay`` and ``alpha`` are is in ``local_steps.py``. Subclasses say what is told, and how
    ``theta`` moves.

    Args:
        flat: the parameters.
        names: theirs.
        inner: the optimizer of this rank's steps, on no other parameters.
        contribution: how progress is told.
        sync_every, bounds, planned_steps: see ``Cadence``.
        delay, alpha: see there.
        exact: ranks that do not take equally many steps in a round are an error; False: they weigh what they weigh.
        group: ranks to train with; none: all, or this process where torch.distributed is not in use.
    """

    def __init__(
        self,
        flat: Flat,
        names: Iterable[str],
        inner: torch.optim.Optimizer,
        contribution: Contribution,
        *,
        sync_every: Every,
        bounds: Bounds,
        planned_steps: int = 0,
        delay: int = 0,
        alpha: float = 0.0,
        exact: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        known = {id(p) for p in flat.parameters}
        strange = [p for g in inner.param_groups for p in g["params"] if id(p) not in known]
        if strange:
            shape = list(strange[0].shape)
            raise ConfigError(f"the inner optimizer trains a parameter of shape {shape} that params lack: give it both")
        fragments = len(flat.fragments)
        self.optimizer, self._flat, self._contribution = inner, flat, contribution
        self.inner: Inner = inner
        self._names = list(names)
        self._sync_every = sync_every
        self.cadence = Cadence(sync_every, fragments, planned_steps, bounds)
        self._exchange = Exchange(group, flat.device, exact)
        self.traffic: Traffic = self._exchange.traffic
        self._delay, self._alpha = delay, alpha
        self.steps = 0
        self.delta_norm: float | None = None
        self.phases: dict[str, float] = {}
        self._since = self._fragment = 0
        self._tally = Tally(fragments)
        self._agreed = False
        self._equal = True
        self._arrived: Received | None = None
        self._digests = [0] * fragments

    @property
    def due(self) -> int:
        """Steps until ranks meet next: a contribution leaves, or one is applied."""
        interval = self.cadence.every // len(self._flat.fragments)
        return interval - self._since - (self._delay if self._since < interval - self._delay else 0)

    def retune(self, optimizer: Any, section: Any) -> None:
        """See the strategy contract."""
        raise NotImplementedError

    def _layout(self) -> str:
        """What state must have in common; subclasses add to it."""
        cut = f"{self._flat.weights} weights, num_fragments {len(self._flat.fragments)}"
        return f"sync_every {self._sync_every}, {cut}, delay {self._delay}"

    def _rules(self) -> str:
        """What ranks must have in common beside that, but another run need not; subclasses add to it."""
        return f"alpha {self._alpha}, require_exact_steps {self._exchange.exact}"

    def _move(self, tile: Tile, mean: torch.Tensor) -> None:
        """``theta`` of a tile, by the mean progress, which may be written to."""
        raise NotImplementedError

    def _settle(self, reason: str) -> None:
        """The number of steps of a round is known, with a reason where it was chosen; called once, on every rank."""
        if reason:
            self._exchange.say(reason)

    def _agree(self, tokens: int) -> None:
        """Compare layouts and the parameters ranks begin with, and take the mean of their tokens as weight 1: where all
        have the same, weights are exactly 1 and the mean is the plain one."""
        tensors = [f"{list(p.shape)} {p.dtype}" for p in self._flat.parameters]
        rules = f"{self._layout()}, {self._rules()}"
        agreement.agree_on_layout(type(self).__name__, tensors, rules, self._flat.device, self._exchange.group)
        self._digests = [self._digest(fragment) for fragment in range(len(self._flat.fragments))]
        together = functools.reduce(lambda total, digest: (31 * total + digest) % 2**64, self._digests, 0)
        heads = self._exchange.heads(Head(tokens, self.steps, together, True))
        agreement.compare_digests([head.digest for head in heads], self.steps)
        self._tally.unit = self._tally.unit or max(1, round(sum(head.weight for head in heads) / len(heads)))
        self._agreed = True
        if self.steps == 0 and self.cadence.settled:
            self._settle("")
        elif self.steps == 0:
            self._exchange.say(f"sync_every auto: rounds of {self.cadence.every} steps until two are measured")

    def _digest(self, fragment: int) -> int:
        return self._flat.digest(fragment) if self._exchange.world > 1 else 0

    def _told(self, contribution: Contribution, fragment: int) -> tuple[Head, torch.Tensor, float]:
        """What to send, and the square of the norm of what it tells."""
        weight = self._tally.weight(fragment)
        message, square = contribution.write(self._flat, fragment, weight)
        head = Head(weight, self._tally.steps[fragment], self._digests[fragment], math.isfinite(square))
        return head, message, square

    def _wait(self) -> None:
        """Take in what is under way, to be applied when it is due."""
        if self._exchange.busy:
            self._arrived = self._exchange.receive()

    def _apply(self, fragment: int) -> None:
        self._wait()
        received, self._arrived = self._arrived, None
        assert received is not None
        began = time.perf_counter()
        for tile, mean in self._contribution.means(self._flat, fragment, received):
            self._move(tile, mean)
            self._flat.take(tile, self._alpha)
        self.phases["apply"] = time.perf_counter() - began
        self._digests[fragment] = self._digest(fragment)
        self._tally.clear(fragment)
        self._equal = len(self._flat.fragments) == 1 and self._alpha == 0

    def _took(self, steps: int, taken: int, tokens: int) -> None:
        self.cadence.step_ends()
        self.steps += steps
        self._since += steps
        self._equal, self.delta_norm, self.phases = False, None, {}
        self._tally.add(taken, tokens)
        interval = self.cadence.every // len(self._flat.fragments)
        if self._since == interval - self._delay:
            began = time.perf_counter()
            head, message, square = self._told(self._contribution, self._fragment)
            self.phases["coding"] = time.perf_counter() - began
            self._tally.square += square
            self._exchange.send(head, message)
        if self._since == interval:
            self._apply(self._fragment)
            self._since, self._fragment = 0, (self._fragment + 1) % len(self._flat.fragments)
            if self._fragment == 0:
                self._end_round()
        self.cadence.step_begins()

    def _end_round(self) -> None:
        self.delta_norm, self._tally.square = math.sqrt(self._tally.square), 0.0
        if (measured := self.cadence.round_ends(self.traffic.seconds)) is not None:
            self._settle(self.cadence.choose(self._exchange.numbers(measured)))
