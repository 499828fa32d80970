"""Pictures by matplotlib, an optional package: import this module where a picture is asked for, not above.

Figures are made without pyplot, so nothing is drawn on a screen and none is kept in memory.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sparktrain.errors import ConfigError

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator
except ImportError:
    raise ConfigError("pictures need matplotlib: pip install 'sparktrain[plot]'") from None

if TYPE_CHECKING:
    from sparktrain.results import RunResult

Numbers = npt.NDArray[np.float64]

# Okabe and Ito's, which colour-blind people can tell apart, too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_TIMES = {
    "forward and backward": "#0072B2",
    "optimizer": "#56B4E9",
    "communication": "#D55E00",
    "data": "#E69F00",
}


class Picture(Figure):
    """A figure that notebooks show by itself."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """``figure`` as a PNG file's content."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()


def panel(axes: Axes, title: str, x: str, y: str = "") -> Axes:
    """``axes`` as all of ours look."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def smoothed(values: Sequence[float] | Numbers, part: float = 0.02) -> Numbers:
    """Exponential moving average over about ``part`` of them, without the pull of its beginning."""
    decay = 1 - 1 / max(1.0, part * len(values))
    sums, weight, found = 0.0, 0.0, []
    for value in values:
        sums, weight = decay * sums + value, decay * weight + 1
        found.append(sums / weight)
    return np.array(found)


def run_figure(result: "RunResult") -> Picture:
    """A finished run in six panels: loss, learning rate, gradient norm, speed, bytes, and the ranks' time."""
    metrics = {name: result.table[name].to_numpy() for name in result.table.column_names}
    steps = metrics["step"] + 1
    figure = Picture(figsize=(11, 10), layout="constrained")
    grid = figure.subplots(3, 2)
    _loss(grid[0, 0], result, steps, metrics)
    rate = panel(grid[0, 1], "Learning rate", "step")
    rate.plot(steps, metrics["lr"], color=COLORS[0])
    rate.set_ylim(bottom=0)
    _noisy(panel(grid[1, 0], "Gradient norm", "step"), steps, metrics["grad_norm"])
    _noisy(panel(grid[1, 1], "Speed", "step", "tokens/s, all ranks"), steps, metrics["tokens"] / metrics["seconds"])
    grid[1, 1].yaxis.set_major_formatter(EngFormatter())
    moved = panel(grid[2, 0], "Bytes of a rank so far", "step")
    for name, style in (("payload_bytes", "-"), ("bytes_sent", "--"), ("bytes_received", ":")):
        label = name.replace("_bytes", "").replace("bytes_", "")
        moved.plot(steps, np.cumsum(metrics[name]), style, color=COLORS[len(moved.lines)], linewidth=2, label=label)
    moved.yaxis.set_major_formatter(EngFormatter("B"))
    moved.legend(frameon=False)
    _times(grid[2, 1], result)
    for axes in grid.flat[:5]:
        axes.set_xlim(left=0)
    return figure


def _loss(axes: Axes, result: "RunResult", steps: Numbers, metrics: dict[str, Any]) -> None:
    panel(axes, "Loss", "step", "nats per token")
    _noisy(axes, steps, metrics["loss"], "training")
    points = heldout_points(result)
    if points:
        at, losses = zip(*points, strict=True)
        axes.plot(at, losses, "o-" if len(points) > 2 else "o", color=COLORS[1], label="held-out", markersize=4)
    axes.legend(frameon=False)


def heldout_points(result: "RunResult") -> list[tuple[int, float]]:
    """(steps done, held-out loss) wherever it was measured."""
    first, table = result.ranks[0], result.table
    found = [(0, first.heldout_before)]
    found += [(s + 1, v) for s, v in zip(table["step"].to_pylist(), table["heldout_loss"].to_pylist(), strict=True)]
    found.append((table.num_rows, first.heldout_after))
    return [(step, loss) for step, loss in found if loss is not None]


def _noisy(axes: Axes, x: Numbers, y: Numbers, label: str = "") -> None:
    """Every value faintly, their moving average over it; what a few values leave the rest no room for is cut off."""
    axes.plot(x, y, color=COLORS[0], alpha=0.3, linewidth=0.8)
    axes.plot(x, smoothed(y), color=COLORS[0], linewidth=1.8, label=label)
    low, high = np.quantile(y, [0.005, 0.995])
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _times(axes: Axes, result: "RunResult") -> None:
    """Seconds of each rank, as bars."""
    panel(axes, "Time of each rank", "seconds")
    table = result.rank_table
    ranks = table["rank"].to_numpy()
    hosts = {r.rank: r.host for r in result.ranks}
    whole = {name: table[f"{name}_seconds"].to_numpy() for name in ("compute", "optimizer", "communication", "data")}
    parts = {
        "forward and backward": whole["compute"] - whole["optimizer"],
        **{name: whole[name] for name in ("optimizer", "communication", "data")},
    }
    numbers = sorted(set(ranks.tolist()))
    left = np.zeros(len(numbers))
    for name, color in _TIMES.items():
        seconds = np.array([parts[name][ranks == number].sum() for number in numbers])
        axes.barh([str(n) for n in numbers], seconds, left=left, color=color, label=name, height=0.6)
        left += seconds
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(numbers)), [f"rank {n}\n{hosts.get(n, '')}" for n in numbers])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.legend(frameon=False, ncols=2, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.18))
