"""What strategies have in common whose ranks take steps of their own and synchronise every H of them.

``theta``: the parameters that all ranks share, in float32; ``x``: those that this rank trains::

    H times: x = inner(x, gradient of this rank's tokens)        the inner optimizer's state is kept, never sent
    D = mean over ranks of what is told of theta - x             weighed by the tokens of each rank in this round
    theta = outer(theta, D);  x = theta

With P fragments, one is synchronised every H / P steps, each once in H. Its contribution is sent ``delay`` steps
before that, and travels while they are taken; then ``x = alpha * x + (1 - alpha) * theta``.

``sync()`` within a round: all ranks go on from the mean of their parameters, weighed by tokens, which one float32
all-reduce brings. ``theta``, momentum, residuals and the count of steps stay as they are, so a round is no shorter for
it; where ranks are equal already, at the end of a round, nothing is sent but digests.

State and world size. The shared part is the same everywhere and holds ``theta``, what is under way and the counts; the
part of a rank holds its parameters, its inner optimizer and what it has not told yet. In a world of another size, rank
r takes the part of old rank r; a rank that has none begins at ``theta`` with an inner optimizer that knows nothing,
and weighs nothing until it has tokens; progress of ranks that are gone is lost back to the last round.
"""

import copy
import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from sparktrain.errors import ConfigError
from sparktrain.train.strategies.contract import Traffic
from sparktrain.train.strategies.replicas import agreement
from sparktrain.train.strategies.replicas.cadence import Bounds, Cadence, Every
from sparktrain.train.strategies.replicas.dense import Contribution, Dense
from sparktrain.train.strategies.replicas.exchange import Exchange, Head, Received
from sparktrain.train.strategies.replicas.flat import Flat, Tile


class LocalSteps:
    """See the module. Subclasses say what is told, and how ``theta`` moves.

    Args:
        flat: the parameters.
        names: theirs.
        inner: the optimizer of this rank's steps, on no other parameters.
        contribution: how progress is told.
        sync_every, bounds, planned_steps: see ``Cadence``.
        delay, alpha: see the module.
        exact: ranks that do not take equally many steps in a round are an error; False: they weigh what they weigh.
        group: ranks to train with; none: all, or this process where torch.distributed is not in use.
    """

    local = True

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
        self.inner, self._flat, self._contribution = inner, flat, contribution
        self._names = list(names)
        self._sync_every = sync_every
        self.cadence = Cadence(sync_every, fragments, planned_steps, bounds)
        self._exchange = Exchange(group, flat.device, exact)
        self.traffic: Traffic = self._exchange.traffic
        self._delay, self._alpha = delay, alpha
        self.steps = 0
        self._since = self._fragment = self._unit = 0
        self._tokens, self._counted = [0] * fragments, [0] * fragments
        self._agreed = False
        self._equal = True
        self._arrived: Received | None = None
        self._digests = [0] * fragments

    def average_gradients(self) -> None:
        """Nothing: each rank keeps its own."""

    @torch.no_grad()
    def step(self, lr: float | None = None, tokens: int = 1) -> None:
        """One inner step on ``.grad``, the gradient of the mean loss of ``tokens`` tokens of this rank, with ``lr``
        (none: the inner optimizer's); then the sync that is due. Every rank must call it."""
        if not self._agreed:
            self._agree(tokens)
        if lr is not None:
            for group in self.inner.param_groups:
                group["lr"] = lr
        self.inner.step()
        self.cadence.step_ends()
        self.steps += 1
        self._since += 1
        self._equal = False
        self._tokens = [t + tokens for t in self._tokens]
        self._counted = [c + 1 for c in self._counted]
        interval = self.cadence.every // len(self._flat.fragments)
        if self._since == interval - self._delay:
            self._exchange.send(*self._told(self._contribution, self._fragment))
        if self._since == interval:
            self._apply(self._fragment)
            self._since, self._fragment = 0, (self._fragment + 1) % len(self._flat.fragments)
            if self._fragment == 0:
                self._end_round()
        self.cadence.step_begins()

    @torch.no_grad()
    def sync(self) -> None:
        """Bring all ranks to equal parameters, see the module; ``Diverged`` names the ranks that differ."""
        self._wait()
        world = self._exchange.world
        if world == 1:
            return
        if not (self._equal and self._exchange.exact):
            exact = Dense(self._flat, None, feedback=False)
            for fragment in range(len(self._flat.fragments)):
                self._exchange.send(*self._told(exact, fragment))
                for tile, mean in exact.means(self._flat, fragment, self._exchange.receive()):
                    self._flat.put(tile, mean)
        self._equal = True
        digest = agreement.digest([self._flat.shared, *self._flat.parameters])
        heads = self._exchange.heads(Head(0.0, self.steps, digest, True))
        agreement.compare_digests([head.digest for head in heads], self.steps)

    def extract(self) -> dict[str, torch.Tensor]:
        """``theta`` by name: what all ranks had after the last round."""
        return dict(zip(self._names, self._flat.shared_parameters(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """``{"shared": the same on every rank, "rank": this rank's own}``; not copies. Waits for what is under way."""
        self._wait()
        rank = {
            "parameters": [p.detach() for p in self._flat.parameters],
            "inner": self.inner.state_dict(),
            "residual": self._contribution.residual,
            "tokens": self._tokens,
        }
        arrived = self._arrived and list(self._arrived)
        shared = {
            "layout": self._layout(),
            "theta": self._flat.shared,
            "every": [self.cadence.every, self.cadence.settled, self.cadence.rounds],
            "counters": [self.steps, self._since, self._fragment, self._unit, self._equal],
            "counted": self._counted,
            "arrived": arrived,
        }
        return {"shared": shared, "rank": rank}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, parameters included; without a "rank" part, see the module."""
        shared, rank = state_dict["shared"], state_dict.get("rank")
        if shared["layout"] != self._layout():
            raise ConfigError(f"state was saved with {shared['layout']}, this run has {self._layout()}: use the same")
        self._flat.shared.copy_(shared["theta"])
        self.cadence.every, self.cadence.settled, self.cadence.rounds = shared["every"]
        self.steps, self._since, self._fragment, self._unit, self._equal = shared["counters"]
        self._counted = list(shared["counted"])
        self._arrived = None
        if shared["arrived"]:
            data, weights, total = shared["arrived"]
            self._arrived = Received(data.to(self._flat.device, copy=True), weights, total)
        self._tokens = list(rank["tokens"]) if rank else [0] * len(self._counted)
        if self._contribution.residual is not None:
            self._contribution.residual.copy_(rank["residual"]) if rank else self._contribution.residual.zero_()
        if rank is None:
            self.inner.state.clear()
            for tile in self._flat.all_tiles():
                self._flat.take(tile, 0.0)
        else:
            # A copy: the next step would write into the caller's.
            self.inner.load_state_dict(copy.deepcopy(rank["inner"]))
            for parameter, value in zip(self._flat.parameters, rank["parameters"], strict=True):
                parameter.copy_(value)
        self._agreed = False

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
        self._unit = self._unit or max(1, round(sum(head.weight for head in heads) / len(heads)))
        self._agreed = True
        if self.steps == 0 and self.cadence.settled:
            self._settle("")

    def _digest(self, fragment: int) -> int:
        return self._flat.digest(fragment) if self._exchange.world > 1 else 0

    def _told(self, contribution: Contribution, fragment: int) -> tuple[Head, torch.Tensor]:
        counted = self._counted[fragment]
        weight = self._tokens[fragment] / (self._unit * counted) if counted else 1.0
        message, finite = contribution.write(self._flat, fragment, weight)
        return Head(weight, counted, self._digests[fragment], finite), message

    def _wait(self) -> None:
        """Take in what is under way, to be applied when it is due."""
        if self._exchange.busy:
            self._arrived = self._exchange.receive()

    def _apply(self, fragment: int) -> None:
        self._wait()
        received, self._arrived = self._arrived, None
        assert received is not None
        for tile, mean in self._contribution.means(self._flat, fragment, received):
            self._move(tile, mean)
            self._flat.take(tile, self._alpha)
        self._digests[fragment] = self._digest(fragment)
        self._tokens[fragment] = self._counted[fragment] = 0
        self._equal = len(self._flat.fragments) == 1 and self._alpha == 0

    def _end_round(self) -> None:
        if (measured := self.cadence.round_ends(self.traffic.seconds)) is not None:
            self._settle(self.cadence.choose(self._exchange.numbers(measured)))
