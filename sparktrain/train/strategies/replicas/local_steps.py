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
from typing import Any

import torch

from sparktrain.errors import ConfigError
from sparktrain.train.strategies.replicas import agreement
from sparktrain.train.strategies.replicas.dense import Dense
from sparktrain.train.strategies.replicas.exchange import Head, Received
from sparktrain.train.strategies.replicas.rounds import Inner, Rounds


class LocalSteps(Rounds):
    """See the module and ``Rounds``."""

    local, refuses = True, False

    def average_gradients(self) -> None:
        """Nothing: each rank keeps its own."""

    @torch.no_grad()
    def step(self, lr: float | None = None, tokens: int = 1) -> None:
        """One inner step on ``.grad``, the gradient of the mean loss of ``tokens`` tokens of this rank, with ``lr``
        (none: the inner optimizer's); then the sync that is due. Every rank must call it."""
        if not self._agreed:
            self._agree(tokens)
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        self.optimizer.step()
        self._took(1, 1, tokens)

    def hand_over(self, inner: Inner, exact: bool) -> None:
        """``inner`` takes the steps from now on, and :meth:`advance` is told of them; ``exact``: as for the class."""
        self.inner, self._exchange.exact = inner, exact

    @torch.no_grad()
    def advance(self, steps: int, taken: int, tokens: int) -> None:
        """``steps`` steps, at most :attr:`due`, are over, of which this rank's parameters show ``taken``, on ``tokens``
        tokens; then the sync that is due. Every rank must call it with the same ``steps``."""
        assert 1 <= steps <= self.due
        if not self._agreed:
            self._agree(tokens // taken)
        self._took(steps, taken, tokens)

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
                head, message, _ = self._told(exact, fragment)
                self._exchange.send(head, message)
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
            "tokens": self._tally.tokens,
            "square": self._tally.square,
        }
        arrived = self._arrived and list(self._arrived)
        shared = {
            "layout": self._layout(),
            "theta": self._flat.shared,
            "every": [self.cadence.every, self.cadence.settled, self.cadence.rounds],
            "counters": [self.steps, self._since, self._fragment, self._tally.unit, self._equal],
            "counted": self._tally.steps,
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
        self.steps, self._since, self._fragment, self._tally.unit, self._equal = shared["counters"]
        self._tally.steps = list(shared["counted"])
        self._arrived = None
        if shared["arrived"]:
            data, weights, total = shared["arrived"]
            self._arrived = Received(data.to(self._flat.device, copy=True), weights, total)
        self._tally.tokens = list(rank["tokens"]) if rank else [0] * len(self._tally.steps)
        self._tally.square = rank["square"] if rank else 0.0
        if self._contribution.residual is not None:
            self._contribution.residual.copy_(rank["residual"]) if rank else self._contribution.residual.zero_()
        if rank is None:
            self.inner.load_state_dict(self.inner.state_dict() | {"state": {}})
            for tile in self._flat.all_tiles():
                self._flat.take(tile, 0.0)
        else:
            # A copy: the next step would write into the caller's.
            self.inner.load_state_dict(copy.deepcopy(rank["inner"]))
            for parameter, value in zip(self._flat.parameters, rank["parameters"], strict=True):
                parameter.copy_(value)
        self._agreed = False
