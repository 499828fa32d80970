"""``report.html``: a run on one page that opens anywhere, with its pictures inside and nothing to fetch."""

import base64
import html
import json
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from pydantic import Field

from sparktrain import __version__
from sparktrain.atomic import write
from sparktrain.config import Section
from sparktrain.config.place import Place
from sparktrain.errors import ConfigError
from sparktrain.results import RunResult
from sparktrain.results.records import PHASES
from sparktrain.rundir import RunDir

_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid #ddd; }
p.where { color: #666; margin-top: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0.2rem 1.2rem 0.2rem 0; vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); column-gap: 3rem; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="where">$where</p>
$body
</body>
</html>
"""
)


class Report(Section):
    """Write a page about a finished run."""

    run_dir: Place = Field()
    """Run directory; the page is its report.html."""


def write_report(settings: Report) -> Path:
    """Write ``report.html`` into a finished run's directory; returns its path.

    Raises :class:`ConfigError` where the run is not finished, or matplotlib is not installed.
    """
    directory = RunDir(settings.run_dir)
    directory.config()
    result = directory.finished()
    if result is None:
        raise ConfigError(f"{directory.path} is not finished: start the same command again, then report on it")
    write(directory.report, page(directory, result).encode())
    return directory.report


def page(directory: RunDir, result: RunResult) -> str:
    """The page of ``result``, which is that of ``directory``."""
    from sparktrain.report.figures import png

    picture = base64.b64encode(png(result.plot())).decode()
    config = directory.config()
    body = [
        _facts(result),
        "<h2>Course</h2>",
        f'<img src="data:image/png;base64,{picture}" alt="Loss, learning rate, gradient norm, speed, bytes and time">',
        "<h2>Ranks</h2>",
        _table(("rank", "host", "steps of the last attempt", "sha256 of the parameters"), _ranks(result)),
        "<h2>Checkpoints</h2>",
        _checkpoints(directory, result),
        "<h2>Settings</h2>",
        f"<pre>{html.escape(json.dumps(config.model_dump(mode='json'), indent=2))}</pre>",
    ]
    title = f"{config.run.dir.name}: {config.strategy.kind}, {result.ranks[0].world} ranks"
    where = f"{result.run_dir} · sparktrain {__version__}"
    return _PAGE.substitute(title=html.escape(title), where=html.escape(where), body="\n".join(body))


def _facts(result: RunResult) -> str:
    s = result.summary()

    def change(name: str, first: float | None, last: float | None) -> tuple[str, str]:
        return name, "not measured" if first is None or last is None else f"{first:.4f} → {last:.4f}"

    columns = [
        [
            change("training loss", s["loss_first"], s["loss_last"]),
            change("held-out loss", s["heldout_loss_before"], s["heldout_loss_after"]),
            ("steps", f"{s['steps']:,}"),
            ("tokens", f"{s['tokens']:,}"),
            ("parameters", f"{s['num_parameters']:,}"),
            ("tokens/s", f"{s['tokens_per_second']:,.0f}"),
        ],
        [
            ("seconds, slowest ranks", f"{s['seconds']:,.1f}"),
            ("of these, optimizer", f"{s['optimizer_seconds']:,.1f}"),
            *((f"of these, {n}", f"{t:,.1f}") for n in PHASES if (t := s[f"{n}_seconds"])),
            ("of these, communication", f"{s['communication_seconds']:,.1f}"),
            ("payload of a rank", f"{s['payload_bytes']:,} bytes"),
            ("sent by a rank", f"{s['bytes_sent']:,} bytes"),
            ("received by a rank", f"{s['bytes_received']:,} bytes"),
        ],
    ]
    tables = ["<table>" + "".join(f"<tr><th>{n}</th><td class=number>{v}</td></tr>" for n, v in c) for c in columns]
    return '<div class="facts">' + "".join(f"{table}</table>" for table in tables) + "</div>"


def _ranks(result: RunResult) -> list[tuple[Any, ...]]:
    return [(rank.rank, rank.host, len(rank.records), rank.digest) for rank in result.ranks]


def _checkpoints(directory: RunDir, result: RunResult) -> str:
    chain = directory.checkpoints.lineage(result.ranks[0].resumed_from)
    kept = sorted(directory.checkpoints.names())
    if not kept:
        return "<p>None are kept.</p>"
    rows = []
    for name in kept:
        manifest = directory.checkpoints.read(name)
        rows.append((name, manifest.step, manifest.generation, manifest.world))
    resumed = f"<p>The last attempt went on from {html.escape(chain[-1].name)}.</p>" if chain else ""
    return resumed + _table(("kept", "after step", "of attempt", "ranks"), rows)


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = ["".join(f"<td>{html.escape(str(value))}</td>" for value in row) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'
