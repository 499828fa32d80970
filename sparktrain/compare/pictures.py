"""The two pictures of a comparison: what loss after how many tokens, and for how many bytes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, NullFormatter

from sparktrain.report.figures import COLORS, Numbers, Picture, heldout_points, panel, smoothed

if TYPE_CHECKING:
    from sparktrain.compare.comparison import Comparison, Entry


@dataclass(frozen=True)
class Course:
    """The best run of a strategy, after each step: tokens, bytes a rank has received, smoothed training loss; and where
    the held-out loss was measured, in steps, and what it was."""

    label: str
    color: str
    tokens: Numbers
    received: Numbers
    training: Numbers
    steps: Numbers
    heldout: Numbers

    @property
    def measured(self) -> bool:
        """Whether the held-out loss was measured on the way: else training losses must do."""
        return len(self.heldout) > 2

    def over(self, x: Numbers) -> tuple[Numbers, Numbers]:
        """(x, held-out loss) wherever it was measured, ``x`` being given after each step and 0 before the first."""
        return np.concatenate([[0.0], x])[self.steps.astype(int)], self.heldout

    def after_syncs(self) -> tuple[Numbers, Numbers]:
        """(bytes, training loss) of the last step before bytes come again; between syncs many are at one place."""
        last = np.diff(self.received, append=np.inf) > 0
        return self.received[last], self.training[last]


def loss_over_tokens(comparison: "Comparison") -> Picture:
    """Held-out loss as points; training loss, smoothed, as a line, faint where the other was measured on the way."""
    figure, axes = _figure("Loss over tokens", "tokens, all ranks")
    for course in _courses(comparison):
        color, at, losses = course.color, *course.over(course.tokens)
        if course.measured:
            axes.plot(course.tokens, course.training, color=color, alpha=0.35, linewidth=1)
            axes.plot(at, losses, "o-", color=color, markersize=4, label=course.label)
        else:
            axes.plot(course.tokens, course.training, color=color, linewidth=1.8, label=course.label)
            axes.plot(at, losses, "o", color=color, markersize=6)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlim(left=0)
    return _finish(figure, axes, "points: held-out; lines without: training, smoothed")


def loss_over_bytes(comparison: "Comparison") -> Picture:
    """Held-out loss, or training loss where that was not measured on the way, over the bytes that a rank has received,
    on a log axis, with the Pareto front of all strategies: the points than which none has a lower loss for as few
    bytes."""
    figure, axes = _figure("Loss over bytes", "bytes a rank has received")
    points, seen = [], "training, smoothed"
    for course in _courses(comparison):
        x, y = course.over(course.received) if course.measured else course.after_syncs()
        seen = "held-out" if course.measured else seen
        points.append(np.stack([x, y])[:, x > 0])
        if points[-1].size:  # not of a single rank
            style = "o-" if course.measured else "-"
            axes.plot(*points[-1], style, color=course.color, markersize=4, label=course.label)
            axes.annotate(course.label, (x[-1], y[-1]), (7, 5), textcoords="offset points", color=course.color)
    front = pareto_front(np.concatenate(points, axis=1))
    if front.size:
        axes.step(*front, where="post", color="#888888", linestyle="--", linewidth=1.2, zorder=1, label="Pareto front")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.1, y=0.08)
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    return _finish(figure, axes, seen)


def pareto_front(points: Numbers) -> Numbers:
    """Of ``[2, n]`` costs and losses those ``[2, m]`` that no other beats in both, by ascending cost."""
    cost, loss = points[:, np.lexsort((points[1], points[0]))]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    return np.stack([cost, loss])[:, loss < best_before]


def _courses(comparison: "Comparison") -> list[Course]:
    several = len(comparison.best) < len(comparison.entries)
    return [
        _course(entry, f"{entry.strategy}, lr {entry.lr:g}" if several else entry.strategy, COLORS[i % len(COLORS)])
        for i, entry in enumerate(comparison.best)
    ]


def _course(entry: "Entry", label: str, color: str) -> Course:
    table, points = entry.result.table, heldout_points(entry.result)
    at, losses = zip(*points, strict=True) if points else ((), ())
    return Course(
        label=label,
        color=color,
        tokens=np.cumsum(table["tokens"].to_numpy()),
        received=np.cumsum(table["bytes_received"].to_numpy()).astype(np.float64),
        training=smoothed(table["loss"].to_numpy()),
        steps=np.array(at, dtype=np.float64),
        heldout=np.array(losses, dtype=np.float64),
    )


def _figure(title: str, x: str) -> tuple[Picture, Axes]:
    figure = Picture(figsize=(9, 6), layout="constrained")
    return figure, panel(figure.subplots(), title, x, "nats per token")


def _finish(figure: Picture, axes: Axes, seen: str) -> Picture:
    if axes.lines:
        axes.legend(frameon=False, title=seen, title_fontsize=8)
    return figure
