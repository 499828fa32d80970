"""A compare, run after run."""

import json
from collections.abc import Callable
from pathlib import Path

from sparktrain.atomic import write_json
from sparktrain.compare.comparison import Comparison, Entry, Lost
from sparktrain.compare.settings import Compare
from sparktrain.config import RunConfig
from sparktrain.config.section import differences
from sparktrain.errors import ConfigError, Diverged, SparktrainError
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.storage import is_local
from sparktrain.tokens.sources import absolute

FORMAT = 1
_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def compare(config: Compare, train: Callable[[RunConfig], RunResult]) -> Comparison:
    """Train every run of ``config`` that is not finished, one after the other, and write table and pictures to
    ``config.run.dir``. A run that diverges has a row that says so, and the others go on.

    Raises :class:`ConfigError` where the directory holds anything but this compare, or no picture could be drawn;
    :class:`Diverged` where all runs did; and what else ``train`` raises. The same call goes on from there.
    """
    from sparktrain.compare import pictures  # noqa: F401  before hours of training, not after

    if not is_local(config.run.dir):
        raise ConfigError(f"run.dir {config.run.dir} is in an object store: give a compare a directory")
    directory, runs = config.run.dir.absolute(), list(config.runs())
    ended: list[Entry | Lost] = []
    with RunDir(directory).lock():
        _claim(directory, config)
        for number, (contender, run) in enumerate(runs, 1):
            print(f"run {number} of {len(runs)}: {contender.label}, lr {run.optimizer.lr:g}", flush=True)
            what = contender.label, contender.strategy.kind, run.optimizer.lr
            try:
                ended.append(Entry(*what, train(run), _ELEMENT_BYTES[config.model.dtype]))
            except SparktrainError as error:
                if error.exit_code != Diverged.exit_code:
                    raise
                ended.append(Lost(*what, str(run.run.dir), str(error)))
                print(f"{contender.label}, lr {run.optimizer.lr:g} diverged: {error}", flush=True)
        comparison = Comparison(tuple(ended))
        if not comparison.entries:
            raise Diverged(f"all {len(runs)} runs of {directory} diverged: lower optimizer.lr or the strategies' lr")
        comparison.write(directory)
    return comparison


def _claim(directory: Path, config: Compare) -> None:
    """Make ``directory`` this compare's. Strategies and learning rates may change: each run guards its own."""
    file, identity = directory / "compare.json", config.identity()
    identity["optimizer"].pop("lr")
    identity.pop("strategies")
    placed = config.data.placed(absolute)
    identity["data"] |= {name: placed.get(name, []) for name in ("path", "sources", "heldout")}
    if not file.exists():
        if any(path.name != "LOCK" and not path.name.startswith(".") for path in directory.iterdir()):
            raise ConfigError(f"run.dir {directory} is not empty and holds no compare: choose another run.dir")
        write_json(file, {"format": FORMAT, "identity": identity})
        return
    try:
        known = json.loads(file.read_text(encoding="utf-8"))["identity"]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"run.dir {directory} has a compare.json that is none: choose another run.dir") from None
    if changed := differences(known, identity):
        what = "; ".join(changed[:3])
        raise ConfigError(f"run.dir {directory} holds another compare: {what}: choose another run.dir")
