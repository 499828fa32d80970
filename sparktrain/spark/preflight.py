"""What must hold before ranks are started; each failed check says what was found, what was needed, what to set.

Ten silent minutes is what Spark gives a barrier stage with too few slots; these checks take seconds.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from sparktrain.config import Data, InnerLoop, RunConfig
from sparktrain.errors import ConfigError, DataError, LaunchError
from sparktrain.spark import context, sanity, task
from sparktrain.spark.scheduling import check_drivers_gpus, check_executors_settings, conf
from sparktrain.storage import place
from sparktrain.tokens.sources import absolute

# Executors register a moment after the session is there.
_REGISTRATION_SECONDS = 8.0
# Where an executor was lost, the cluster may start another.
_REPLACEMENT_SECONDS = 20.0


def resolve(spark: SparkSession, config: RunConfig) -> RunConfig:
    """``config`` with every ``auto`` decided by this cluster, where a Connect client's ranks run, and paths absolute.

    Raises :class:`ConfigError` where the cluster cannot run so many ranks in that way.
    """
    mode = config.launch.mode
    if mode == "auto":
        mode = "local" if is_local_master(spark) and not context.is_connect(spark) else "executors"
    if mode == "executors":
        check_executors_settings(spark)
        slots = count_slots(spark, config.launch.ranks)
        ranks, threads = config.launch.ranks or slots, int(conf(spark, "spark.task.cpus", "1"))
        if ranks > slots:
            raise ConfigError(
                f"launch.ranks is {ranks}, but the cluster has {slots} slots for barrier tasks: set launch.ranks to at "
                f"most {slots}, or give Spark more (spark.executor.instances, spark.executor.cores), or lower "
                "spark.task.cpus"
            )
    else:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        ranks = config.launch.ranks or context.parallelism(spark)
        threads = max(1, cores // ranks)
        check_drivers_gpus(spark, ranks)
        if config.launch.launcher == "direct" and ranks > 1:
            raise ConfigError(
                "launch.launcher is direct, which starts one rank per Spark task, but launch.mode is local: "
                "set launch.launcher to torchrun"
            )
    for name, batch in [
        ("total_batch", config.train.total_batch),
        *(("batch_ramp", b) for _, b in config.train.batch_ramp),
    ]:
        if ranks > batch:
            raise ConfigError(
                f"launch.ranks is {ranks}, more than train.{name} {batch}: "
                f"set launch.ranks to at most {batch} or train.{name} to at least {ranks}"
            )
    if not isinstance(weights := config.launch.weights, str) and len(weights) != ranks:
        raise ConfigError(f"launch.weights are {len(weights)} numbers for {ranks} ranks: give one for each rank")
    values = config.model_dump(mode="json")
    values["launch"] |= {"mode": mode, "ranks": ranks, "threads": config.launch.threads or threads}
    values["run"]["dir"] = str(place(config.run.dir))
    values["data"] |= _absolute(config.data)
    values["inner_loop"] |= _program(config.inner_loop)
    if config.model.tokenizer:
        values["model"]["tokenizer"] = str(config.model.tokenizer.absolute())
    local_model = Path(values["model"]["from_pretrained"] or "")
    if values["model"]["from_pretrained"] and local_model.is_dir():
        values["model"]["from_pretrained"] = str(local_model.absolute())
    return RunConfig.model_validate(values)


def ranks_left(spark: SparkSession, config: RunConfig) -> int:
    """Ranks of the next attempt after one that failed: as many as before, or what is left of them.

    Raises :class:`LaunchError` where that is fewer than ``launch.min_ranks``.
    """
    ranks = config.launch.ranks
    if config.launch.mode == "local":
        return ranks
    deadline = time.monotonic() + _REPLACEMENT_SECONDS
    while (slots := count_slots(spark)) < ranks and time.monotonic() < deadline:
        time.sleep(0.5)
    needed = config.launch.min_ranks or ranks
    if slots < needed:
        raise LaunchError(
            f"{slots} slots are left for {needed} ranks: start the same command again when there are more executors, "
            "or set launch.min_ranks lower"
        )
    return min(ranks, slots)


def check_executors(spark: SparkSession, config: RunConfig, paths: list[str]) -> dict[str, Any]:
    """Ask as many executors as there will be ranks (in local mode: this machine) whether they can run ``config``.

    Returns what training the model needs (:func:`sparktrain.train.describe.describe`), with a row per rank (``rows``).
    Raises the first problem.
    """
    reports = _probe(spark, config, paths)
    directory = config.run.dir
    unseen = [r for r in reports if not (directory / f".probe-{r['node']}").exists() and not r["unwritable"]]
    for report in reports:
        (directory / f".probe-{report['node']}").unlink(missing_ok=True)
    for report in reports:
        host = report["host"]
        if report["unwritable"]:
            raise ConfigError(
                f"run.dir {directory} cannot be written on executor {host} ({report['unwritable']}): "
                "use a directory that all executors share"
            )
        if report["unreadable"]:
            raise DataError(
                f"{report['unreadable'][0]} cannot be read on executor {host}: use a directory that all executors share"
            )
    if unseen:
        raise ConfigError(
            f"run.dir {directory} on executor {unseen[0]['host']} is not the driver's: use a directory that all "
            "executors and the driver share (NFS, /dbfs, /Volumes, ...)"
        )
    sanity.check_versions(reports)
    for report in reports:
        if problem := sanity.problem_of(report):
            raise problem
    return dict(reports[0]["model"]) | {"rows": sanity.rows_of(reports, config)}


def is_local_master(spark: SparkSession) -> bool:
    """Whether executors are threads of the driver's JVM (``local[4]``; ``local-cluster`` has real ones)."""
    master = conf(spark, "spark.master", "")
    return master == "local" or master.startswith("local[")


def uses_gpu(spark: SparkSession, local: bool) -> bool:
    """Whether Spark gives ranks GPUs: by ``spark.task.resource.gpu.amount``, in local mode by the driver's."""
    key = "spark.driver.resource.gpu.amount" if local else "spark.task.resource.gpu.amount"
    return conf(spark, key, "0") not in ("", "0")


def import_path() -> tuple[str, ...]:
    """The driver's import path, for ranks."""
    return tuple(str(Path(path).absolute()) for path in sys.path)


def _absolute(data: Data) -> dict[str, Any]:
    """The places in ``data`` for other processes. Raises :class:`DataError` for a URI of no kind that is known."""
    found = data.placed(absolute)
    roots = found.get("mirrors", [])
    read = [(setting, absolute(p)) for setting, places in data.trained_on.items() for p in places]
    outside = [at for at in read if not any(f"{at[1]}/".startswith(f"{root.rstrip('/')}/") for root in roots)]
    useless = outside == read if data.sources else outside  # of several sources, some may have no mirrors
    if roots and (useless or len(roots) == 1):
        raise ConfigError(
            f"data.mirrors are {', '.join(roots)}, which are no mirrors for {' '.join((outside or read)[0])}: "
            "give two roots or more, one of them the one that it is under"
        )
    return found | ({"cache_dir": str(data.cache_dir.absolute())} if data.cache_dir else {})


def _program(settings: InnerLoop) -> dict[str, Any]:
    """Files that the command names, for processes elsewhere; a program to be looked for on the PATH stays a name."""
    words = [
        str(Path(w).absolute()) if Path(w).is_file() and (i or "/" in w) else w for i, w in enumerate(settings.command)
    ]
    return {"command": words, "module_search_roots": [str(root.absolute()) for root in settings.module_search_roots]}


def count_slots(spark: SparkSession, wanted: int = 0) -> int:
    """Barrier tasks the cluster can run at once; fewer than ``wanted``, or 0, only after waiting for executors to
    register."""
    expected = int(conf(spark, "spark.executor.instances", "1"))
    deadline = time.monotonic() + _REGISTRATION_SECONDS
    while True:
        slots, executors = context.slots_and_executors(spark)
        enough = slots >= wanted if wanted else slots and executors >= expected
        if enough or is_local_master(spark) or time.monotonic() > deadline:
            return slots
        time.sleep(0.1)


def _probe(spark: SparkSession, config: RunConfig, paths: list[str]) -> list[dict[str, Any]]:
    arguments = (config.model_dump_json(), str(config.run.dir), tuple(paths), import_path())
    if config.launch.mode == "local":
        before = list(sys.path)
        try:
            return [task.probe(*arguments, 0, looks=True)]
        finally:
            sys.path[:] = before
    config_json, run_dir, readable, imports = arguments
    ask = partial(task.probe_partition, config_json=config_json, run_dir=run_dir, paths=readable, import_path=imports)
    ranks = config.launch.ranks
    rows = spark.range(0, ranks, 1, ranks).mapInArrow(ask, "report string", barrier=True).collect()
    return sorted((json.loads(row.report) for row in rows), key=lambda r: int(r["node"]))
