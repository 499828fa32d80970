"""This rank's updates, made from its gradients, and the updates of all ranks, understood or refused together."""

import time
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparktrain.errors import Diverged
from sparktrain.train.compression.wire import Values
from sparktrain.train.strategies.distro import message as message
from sparktrain.train.strategies.distro.checks import first_not_finite
from sparktrain.train.strategies.distro.tiles import Chosen, Tiles
from sparktrain.train.strategies.replicas.agreement import compare_digests


class Updates:
    """What a rank has sent and not yet forgotten, and how many steps were refused.

    Args:
        tiles: momentum and layout.
        values: how coefficients are sent.
        names: of the parameters, for messages to the user.
        max_refused: stop after so many refused steps in a row.
        late: what was sent leaves the momentum in the next :meth:`make` (Psyche's form), not at once.
    """

    def __init__(self, tiles: Tiles, values: Values, names: Sequence[str], max_refused: int, late: bool) -> None:
        self.refused = self.refused_in_a_row = 0
        self._tiles, self._values, self._names, self._max_refused = tiles, values, names, max_refused
        self._late = late
        self._sent: Chosen | None = None
        self._bad_gradient = ""

    def make(self, gradients: Sequence[Tensor | None], decay: float, rates: Sequence[float], digest: int) -> Tensor:
        """This rank's message, uint8. What it says leaves the momentum, unless the step is refused.

        A gradient that is not finite is dropped; the message says so.
        """
        bad = first_not_finite(self._names, gradients)
        self._bad_gradient = bad or ""
        sent, self._sent = self._sent if self._late else None, None
        if bad is None:
            self._sent = self._tiles.train(gradients, decay, rates, sent, not self._late)
        elif sent is not None:
            self._tiles.add(sent, -1)
        began = time.perf_counter()
        chosen = self._sent if self._sent is not None else self._tiles.nothing()
        written = message.write(self._tiles.layout, self._values, chosen, gradients, bad is not None, digest)
        self._tiles.seconds.coding += time.perf_counter() - began
        return written

    def read(self, everyones: Tensor, step: int) -> message.Said | None:
        """What all ranks' messages [ranks, bytes] say; None where the step is refused, the same on every rank.

        ``Diverged``: refused too often, or the parameters of ranks differ.
        """
        failed = message.failed_ranks(everyones)
        if failed:
            self._refuse(failed)
            return None
        self.refused_in_a_row = 0
        compare_digests(message.digests(everyones), step)
        began = time.perf_counter()
        said = message.read(self._tiles.layout, self._values, everyones)
        self._tiles.seconds.coding += time.perf_counter() - began
        return said

    def state(self) -> dict[str, Any]:
        """This rank's own: momentum, and what was sent and is still in it. Not copies."""
        sent = self._sent if self._late else None
        return {"momentum": self._tiles.momentum, "sent": sent and [sent.index, sent.value, sent.position]}

    def load(self, state: dict[str, Any] | None) -> None:
        """Inverse of :meth:`state`; None: a momentum of zero."""
        self._sent = None
        for number, momentum in enumerate(self._tiles.momentum):
            momentum.copy_(state["momentum"][number]) if state else momentum.zero_()
        if state and state["sent"]:
            # Copies: the next step would write into the caller's.
            self._sent = Chosen(
                *([part.to(self._tiles.device, copy=True) for part in parts] for parts in state["sent"])
            )

    def _refuse(self, failed: list[int]) -> None:
        if self._sent is not None and not self._late:
            self._tiles.add(self._sent, 1)
        self._sent = None
        self.refused += 1
        self.refused_in_a_row += 1
        if self.refused_in_a_row >= self._max_refused:
            here = f", here that of {self._bad_gradient}" if self._bad_gradient else ""
            raise Diverged(
                f"gradients were not finite {self.refused_in_a_row} steps in a row, the last time on "
                f"rank {', '.join(map(str, failed))}{here}: lower optimizer.lr, or look at the data of these steps"
            )
