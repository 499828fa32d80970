"""TensorBoard: event files in ``RUN_DIR/tensorboard``; ``tensorboard --logdir runs`` shows all runs below it."""

import time
from typing import Any, ClassVar

from sparktrain.config import RunConfig
from sparktrain.pulse import Stretch
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.spark.trackers.contract import CURVES


class TensorBoard:
    """Curves over steps, and held-out losses at both ends. Written by TensorBoard's own writer: torch's would bring
    torch into the driver."""

    package: ClassVar[str] = "tensorboard"

    def __init__(self, config: RunConfig, directory: RunDir) -> None:
        self._path, self._steps = directory.path / "tensorboard", config.train.steps
        self._writer: Any = None

    def start(self) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(self._path))

    def log(self, stretch: Stretch) -> None:
        self._write({name: getattr(stretch, name) for name in CURVES}, stretch.step)

    def finish(self, result: RunResult) -> None:
        summary = result.summary()
        for name, step in (("heldout_loss_before", 0), ("heldout_loss_after", self._steps)):
            if summary[name] is not None:
                self._write({"heldout_loss": summary[name]}, step)
        self._writer.close()

    def fail(self, error: BaseException) -> None:
        self._writer.close()

    def _write(self, values: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._writer.flush()
