"""Where metrics go besides the run directory: one file per tracker, and a table.

A tracker is asked in a thread of its own, and the first thing that goes wrong with it is its last: one line warns of
it and the run goes on. None is needed; ``metrics.parquet`` has every step of every rank.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError
from sparktrain.pulse import Stretch
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.spark.trackers.contract import Tracker
from sparktrain.spark.trackers.mlflow import Mlflow, parent
from sparktrain.spark.trackers.tensorboard import TensorBoard
from sparktrain.storage import is_local

TRACKERS: dict[str, type[Tracker]] = {"mlflow": Mlflow, "tensorboard": TensorBoard}


def check(config: RunConfig) -> None:
    """Raises :class:`ConfigError` where the package of a tracker that was asked for is not installed."""
    for name in config.run.trackers:
        if importlib.util.find_spec(TRACKERS[name].package) is None:
            raise ConfigError(
                f"run.trackers has {name}, whose package is not installed: pip install 'sparktrain[{name}]', "
                f"or leave {name} out"
            )
    if "tensorboard" in config.run.trackers and not is_local(config.run.dir):
        raise ConfigError(
            f"run.trackers has tensorboard, which writes files bit by bit, but run.dir {config.run.dir} is in an "
            "object store: take mlflow, or leave tensorboard out"
        )


class Tracking:
    """The trackers of one run."""

    def __init__(self, config: RunConfig, directory: RunDir) -> None:
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._failed: set[str] = set()
        self._trackers: dict[str, Tracker] = {}
        for name in config.run.trackers:
            self._threads[name] = ThreadPoolExecutor(1, thread_name_prefix=name)
            with self._warning(name):
                self._trackers[name] = TRACKERS[name](config, directory)
        self._ask(lambda tracker: tracker.start())

    def log(self, stretch: Stretch) -> None:
        """Tell them what ranks did; returns at once."""
        self._ask(lambda tracker: tracker.log(stretch))

    def finish(self, result: RunResult) -> None:
        """The run is done and its files are there; returns when all trackers have them."""
        self._wait(self._ask(lambda tracker: tracker.finish(result)))

    def fail(self, error: BaseException) -> None:
        """The run ended with ``error``."""
        self._wait(self._ask(lambda tracker: tracker.fail(error)))

    def _ask(self, call: Callable[[Tracker], Any]) -> list[Future[None]]:
        def guarded(name: str, tracker: Tracker) -> None:
            if name not in self._failed:
                with self._warning(name):
                    call(tracker)

        return [self._threads[name].submit(guarded, name, tracker) for name, tracker in self._trackers.items()]

    def _wait(self, futures: list[Future[None]]) -> None:
        for future in futures:
            future.result()
        for thread in self._threads.values():
            thread.shutdown(wait=False)

    @contextlib.contextmanager
    def _warning(self, name: str) -> Iterator[None]:
        """What goes wrong with a tracker, which is other people's code and servers, is one line and no more."""
        try:
            yield
        except Exception as error:
            self._failed.add(name)
            warn(name, error)


@contextlib.contextmanager
def together(names: Sequence[str], directory: Path) -> Iterator[None]:
    """Runs inside belong together: with MLflow among the trackers ``names``, they are children of one run, which is
    called as ``directory`` and gets the files that lie there when all has gone well."""
    with contextlib.ExitStack() as held:
        if "mlflow" in names:
            try:
                held.enter_context(parent(directory))
            except Exception as error:
                warn("mlflow", error)
        yield


def warn(name: str, error: Exception) -> None:
    """One line on standard error: tracker ``name`` failed."""
    reason = next(iter(str(error).splitlines()), "")
    line = f"warning: {name} failed, the run goes on without it: {type(error).__name__}: {reason}"
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def tracking(config: RunConfig, directory: RunDir) -> Iterator[Tracking]:
    """The trackers that ``config`` asks for, told where the run fails inside."""
    trackers = Tracking(config, directory)
    try:
        yield trackers
    except BaseException as error:
        trackers.fail(error)
        raise
