"""The table of a comparison."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from sparktrain.atomic import write
from sparktrain.results import RunResult

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_LAST_PART = 10
_HEAD = (
    ("strategy", ""),
    ("lr", "g"),
    ("loss", ".4f"),
    ("heldout_loss", ".4f"),
    ("tokens_per_second", ",.0f"),
    ("bytes_sent", ",d"),
    ("bytes_received", ",d"),
    ("less_than_ring", ",.1f"),
    ("optimizer_seconds", ",.1f"),
    ("communication_seconds", ",.1f"),
)


@dataclass(frozen=True)
class Entry:
    """One run: a strategy at a learning rate. ``element_bytes``: of a gradient's number."""

    strategy: str
    kind: str
    lr: float
    result: RunResult
    element_bytes: int

    @property
    def score(self) -> float:
        """By which learning rates are chosen: held-out loss, or :attr:`loss` where that was not measured."""
        after = self.result.ranks[0].heldout_after
        return self.loss if after is None else after

    @property
    def loss(self) -> float:
        """Mean training loss, in nats per token, of the last tenth of the steps that were not skipped."""
        taken = [row for row in self.result.table.to_pylist() if math.isfinite(row["loss"])]
        last = taken[-max(1, len(taken) // _LAST_PART) :]
        return (
            sum(row["loss"] * row["tokens"] for row in last) / sum(row["tokens"] for row in last) if last else math.nan
        )

    @property
    def place(self) -> tuple[bool, float]:
        """By which it stands among its strategy's: a score that is no number is the worst."""
        return math.isnan(self.score), self.score

    def row(self, best: bool) -> dict[str, Any]:
        """Bytes and seconds are a rank's, as in :meth:`RunResult.summary`; ``less_than_ring``: how many times fewer
        bytes it received than a ring all-reduce of the gradient in every step would bring it; None: none at all."""
        s = self.result.summary()
        took = ("payload_bytes", "bytes_sent", "bytes_received")
        spent = ("seconds", "data_seconds", "compute_seconds", "optimizer_seconds", "communication_seconds")
        return {
            "strategy": self.strategy,
            "kind": self.kind,
            "lr": self.lr,
            "best": best,
            "outcome": "finished",
            "ranks": s["world_size"],
            "steps": s["steps"],
            "tokens": s["tokens"],
            "num_parameters": s["num_parameters"],
            "loss": self.loss,
            "heldout_loss": s["heldout_loss_after"],
            "tokens_per_second": s["tokens_per_second"],
            **{name: s[name] for name in took},
            "less_than_ring": s[f"fewer_than_ring_{'bf16' if self.element_bytes == 2 else 'fp32'}"],
            **{name: s[name] for name in spent},
            "run_dir": self.result.run_dir,
        }


@dataclass(frozen=True)
class Lost:
    """A run that diverged, and what it said last."""

    strategy: str
    kind: str
    lr: float
    run_dir: str
    why: str

    def row(self) -> dict[str, Any]:
        """What is known of it; nothing of how far it came, as that is no result."""
        return {
            "strategy": self.strategy,
            "kind": self.kind,
            "lr": self.lr,
            "best": False,
            "outcome": f"diverged: {self.why}",
            "run_dir": self.run_dir,
        }


@dataclass(frozen=True)
class Comparison:
    """All runs of a compare, in the order of its settings; one of them at least has ended well."""

    runs: tuple[Entry | Lost, ...]

    @property
    def entries(self) -> list[Entry]:
        """The runs that ended well."""
        return [run for run in self.runs if isinstance(run, Entry)]

    @property
    def best(self) -> list[Entry]:
        """The best run of each strategy that has one."""
        names = dict.fromkeys(entry.strategy for entry in self.entries)
        return [min((e for e in self.entries if e.strategy == name), key=lambda e: e.place) for name in names]

    @property
    def table(self) -> pa.Table:
        """A row per run; ``best``: the one of its strategy that counts; ``outcome``: ``finished``, or ``diverged`` and
        why, with nothing measured beside it."""
        best = self.best
        rows = [run.row(run in best) if isinstance(run, Entry) else run.row() for run in self.runs]
        names = list(self.entries[0].row(best=True))
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        for name in ("heldout_loss", "less_than_ring"):  # a column of nothing but None has a type, too
            table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.float64()))
        return table

    @property
    def frame(self) -> "pd.DataFrame":
        """:attr:`table` as a pandas frame."""
        frame: pd.DataFrame = self.table.to_pandas()
        return frame

    def spark_frame(self, spark: Any) -> Any:
        """:attr:`table` as a Spark frame of session ``spark``."""
        return spark.createDataFrame(self.table)

    def markdown(self) -> str:
        """The columns that matter most, in columns; the best of several learning rates is marked by ``*``."""
        rows = self.table.to_pylist()
        several = len(self.entries) > len(self.best)
        cells = [[name.replace("_", " ") for name, _ in _HEAD]]
        for row in rows:
            line = ["" if row[name] is None else format(row[name], form) for name, form in _HEAD]
            if row["outcome"] != "finished":
                line[2] = "diverged"
            line[1] += " *" if several and row["best"] else ""
            cells.append(line)
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEAD))]
        rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        lines = [
            [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
            for line in cells
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])

    def loss_over_tokens(self) -> "Figure":
        """See :func:`sparktrain.compare.pictures.loss_over_tokens`."""
        from sparktrain.compare import pictures

        return pictures.loss_over_tokens(self)

    def loss_over_bytes(self) -> "Figure":
        """See :func:`sparktrain.compare.pictures.loss_over_bytes`."""
        from sparktrain.compare import pictures

        return pictures.loss_over_bytes(self)

    def write(self, directory: Path) -> None:
        """``compare.csv``, ``.parquet`` and ``.md``, and the two pictures."""
        from sparktrain.report.figures import png

        csv, parquet = io.BytesIO(), io.BytesIO()
        pacsv.write_csv(self.table, csv)
        pq.write_table(self.table, parquet)
        drawn: Sequence[tuple[str, bytes]] = [
            ("loss_over_tokens.png", png(self.loss_over_tokens())),
            ("loss_over_bytes.png", png(self.loss_over_bytes())),
        ]
        table = [("csv", csv.getvalue()), ("parquet", parquet.getvalue()), ("md", (self.markdown() + "\n").encode())]
        for name, content in [*((f"compare.{kind}", content) for kind, content in table), *drawn]:
            write(directory / name, content)
