"""Lines of finished runs as tables and pictures: one of each for every group of runs that can be compared."""

import csv
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

Line = dict[str, Any]


def lines(file: Path) -> list[Line]:
    return [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []


def group(line: Line) -> tuple[Any, ...]:
    """What runs must have in common to be in one table."""
    model = json.dumps(line["model"], sort_keys=True)
    return line["steps"], line["tokens_per_step"], line["sequence_length"], line["warmup_steps"], line["data"], model


def crossed(line: Line, point: int = -1) -> int:
    """Bytes in and out of a rank up to a point of its curve."""
    return int(line["curve"][point][3] + line["curve"][point][4])


def rows(runs: list[Line]) -> list[dict[str, Any]]:
    """One of each entry and learning rate, best first. Bytes are the same for every seed."""
    by_entry: dict[tuple[str, float], dict[int, Line]] = {}
    for run in runs:
        by_entry.setdefault((run["name"], run["lr"]), {})[run["seed"]] = run
    losses = {entry: statistics.mean(run["loss"] for run in seeds.values()) for entry, seeds in by_entry.items()}
    # Of the first seed: not all entries may have all of them.
    first = min(run["seed"] for run in runs)
    best = {
        name: min((r["loss"] for r in runs if r["name"] == name and r["seed"] == first), default=None)
        for name in ("adamw", "alone")
    }
    ring = max((crossed(run) for run in runs if run["name"] == "adamw"), default=0)
    found = []
    for (name, lr), seeds in sorted(by_entry.items(), key=lambda item: losses[item[0]]):
        line = next(iter(seeds.values()))
        own = seeds[first]["loss"] if first in seeds else None
        found.append(
            {
                "strategy": name,
                "lr": lr,
                "ranks": line["world"],
                "H": line["sync_every"],
                **{f"loss, seed {seed}": f"{run['loss']:.4f}" for seed, run in sorted(seeds.items())},
                "to adamw": f"{own / best['adamw'] - 1:+.1%}" if own and best["adamw"] else "",
                "to alone": f"{own / best['alone'] - 1:+.1%}" if own and best["alone"] else "",
                "payload MB": f"{line['curve'][-1][2] / 1e6:.2f}",
                "sent + received MB": f"{crossed(line) / 1e6:.2f}",
                "fewer than ring": f"{ring / crossed(line):.0f} x" if ring and crossed(line) else "",
            }
        )
    return found


def cells(found: list[dict[str, Any]]) -> list[list[str]]:
    columns = list(dict.fromkeys(column for row in found for column in row))
    return [columns, *([str(row.get(column, "")) for column in columns] for row in found)]


def picture(runs: list[Line], file: Path) -> None:
    """Loss over the bytes in and out of a rank so far, first seed, best rates; who sends none is a dashed line."""
    first = min(run["seed"] for run in runs)
    best: dict[str, Line] = {}
    for run in sorted((r for r in runs if r["seed"] == first), key=lambda r: float(r["loss"])):
        best.setdefault(run["name"], run)
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for name, run in best.items():
        label = f"{name}: {run['loss']:.3f}"
        if crossed(run):
            places = [crossed(run, i) / 1e6 for i in range(len(run["curve"]))]
            axes.plot(places, [point[1] for point in run["curve"]], marker="o", markersize=3, label=label)
        else:
            axes.axhline(run["loss"], color="grey", linestyle="--", label=label)
    axes.set(xscale="log", xlabel="MB in and out of a rank", ylabel="held-out loss, nats per token")
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=110, bbox_inches="tight")
    plt.close(figure)


def write(directory: Path) -> None:
    """``STEPSxTOKENS-WIDTHxLAYERS-DATA.csv``, ``.md`` and, for curves of several points, ``.png`` beside the lines."""
    runs = sorted(lines(directory / "curves.jsonl"), key=group)
    for (steps, tokens, *_, data, _), members in itertools.groupby(runs, group):
        part = list(members)
        width, layers = part[0]["model"]["hidden_size"], part[0]["model"]["num_hidden_layers"]
        name = f"{steps}x{tokens}-{width}x{layers}-{data[:6]}"
        table = cells(rows(part))
        with (directory / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
        ruled = [table[0], ["---"] * len(table[0]), *table[1:]]
        (directory / f"{name}.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in ruled))
        if max(len(run["curve"]) for run in part) > 1:
            picture(part, directory / f"{name}.png")
        print(f"\n{name}\n{(directory / f'{name}.md').read_text()}")
