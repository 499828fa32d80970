"""The loss of a run that trains, drawn in a notebook while it comes."""

import time
from typing import Any

from sparktrain.report.figures import COLORS, Picture, panel

# Part of the driver's time that drawing may take: in local mode ranks have the same cores.
_SHARE = 0.02
_SECONDS_BETWEEN = 2.0


class LiveLoss:
    """A picture below a notebook's cell, of all points so far; new ones are in it when it is drawn again."""

    def __init__(self, steps: int) -> None:
        from IPython.display import display

        self._steps, self._points = steps, list[tuple[int, float]]()
        self._shown: Any = display(self._picture(), display_id=True)  # type: ignore[no-untyped-call]
        self._next = time.monotonic() + _SECONDS_BETWEEN

    def add(self, step: int, loss: float) -> None:
        """Mean ``loss`` of the steps since the point before, up to ``step``."""
        self._points.append((step, loss))
        if time.monotonic() >= self._next:
            self.draw()

    def draw(self) -> None:
        begun = time.monotonic()
        self._shown.update(self._picture())
        now = time.monotonic()
        self._next = now + max(_SECONDS_BETWEEN, (now - begun) / _SHARE)

    def _picture(self) -> Picture:
        figure = Picture(figsize=(7, 3), layout="constrained")
        axes = panel(figure.subplots(), "Loss", "step", "nats per token")
        axes.plot(*zip(*self._points, strict=True) if self._points else ((), ()), color=COLORS[0])
        axes.set_xlim(0, self._steps)
        return figure
