"""The preflight table: one row per rank, one verdict, from what executors said of themselves."""

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sparktrain import __version__
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, DataError, LaunchError, ModelError

Report = Mapping[str, Any]


def rows_of(reports: Sequence[Report], config: RunConfig) -> list[dict[str, Any]]:
    """A row for each rank. The first task on a host has looked for all of that host; in local mode there is one task.

    Raises the first problem, and where hosts would train different models or have too little memory.
    """
    looked = {r["host"]: r["model"]["sanity"] for r in reports if "model" in r}
    hosts = [reports[min(rank, len(reports) - 1)]["host"] for rank in range(config.launch.ranks)]
    rows = [{"rank": rank, "host": host} | looked[host] for rank, host in enumerate(hosts)]
    first = rows[0]
    for row in rows:
        if row["layout"] != first["layout"]:
            raise LaunchError(
                f"executor {row['host']} makes another model of these settings ({row['layout'][-12:]}) than executor "
                f"{first['host']} ({first['layout'][-12:]}): install the same packages on all executors"
            )
    on_host = Counter(hosts)
    for row in rows:
        sharing = 1 if row["device"].startswith("cuda") else on_host[row["host"]]
        if row["needs"] * sharing > row["has"]:
            raise ConfigError(
                f"{sharing} rank(s) on {row['host']} hold {_size(row['needs'] * sharing)} of parameters, gradients and "
                f"state, but its {row['device']} has {_size(row['has'])}: train a smaller model, set model.dtype to "
                "bfloat16, or use other executors"
            )
    every: Any = getattr(config.strategy, "sync_every", "auto")
    if every != "auto" and every > config.train.steps:
        raise ConfigError(
            f"strategy.sync_every is {every}, but train.steps is {config.train.steps}: no round would end; set "
            f"strategy.sync_every to at most {config.train.steps}"
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]], config: RunConfig, traffic: Mapping[str, Any]) -> list[str]:
    """For people: a line per rank, and the verdict."""
    strategy = config.strategy
    tensors = rows[0]["tensors"]
    program = "" if tensors is None else f", {tensors} tensors for {config.inner_loop.command[0]}"
    lines = [
        f"rank {row['rank']:<6}{row['host']}, {row['device']}: layout {row['layout'][13:25]}{program}; "
        f"{_size(row['needs'])} of {_size(row['has'])} and activations; {traffic['payload_bytes']:,} bytes per step"
        for row in rows
    ]
    every, steps = getattr(strategy, "sync_every", 1), config.train.steps
    rounds = f"{steps:,} steps, a sync in each" if every == 1 else f"{steps:,} steps, rounds of {every}"
    if isinstance(every, int) and every > 1:
        rounds += f": {steps // every:,}" + (f" and {steps % every} steps" if steps % every else "")
    share = config.train.total_batch / config.launch.ranks
    return [
        *lines,
        f"verdict    ready: layouts agree; {strategy.kind} took a round on each kind of host; {rounds}; {share:g} "
        "sequences per step and rank",
    ]


def problem_of(report: Report) -> Exception | None:
    """What a task said that its executor cannot do."""
    if "problem" not in report:
        return None
    kind = next((k for k in (ConfigError, DataError, ModelError) if k.exit_code == report["code"]), LaunchError)
    return kind(report["problem"])


def check_versions(reports: Sequence[Report]) -> None:
    """All executors alike, and like the driver where the driver takes part (python, sparktrain)."""
    first = reports[0]
    for report in reports:
        host = report["host"]
        missing = [name for name, version in report["packages"].items() if version == "missing"]
        if missing:
            raise LaunchError(
                f"executor {host} lacks {', '.join(missing)}: install it there, or ship an environment (spark.archives)"
            )
        if report["packages"]["sparktrain"] != __version__:
            raise LaunchError(
                f"executor {host} has sparktrain {report['packages']['sparktrain']}, the driver {__version__}: "
                "install the same wheel on both"
            )
        for name, version in {**report["packages"], "python": report["python"]}.items():
            other = {**first["packages"], "python": first["python"]}[name]
            if version != other:
                raise LaunchError(
                    f"executor {host} has {name} {version}, executor {first['host']} has {other}: "
                    "install the same on all executors"
                )
    if first["python"].rsplit(".", 1)[0] != platform.python_version().rsplit(".", 1)[0]:
        raise LaunchError(
            f"executors run Python {first['python']}, the driver {platform.python_version()}: "
            "set PYSPARK_PYTHON to the same"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
