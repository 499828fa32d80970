"""What a tracker is."""

from typing import ClassVar, Protocol

from sparktrain.config import RunConfig
from sparktrain.pulse import Stretch
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir

# Of a stretch, what is a curve over steps.
CURVES = (
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "data",
    "compute",
    "communication",
    "payload_bytes",
    "bytes_received",
    "behind",
)


class Tracker(Protocol):
    """Made in the driver's main thread; all else is called in a thread of the tracker's own, and may raise or block.

    ``package``: what must be installed for it.
    """

    package: ClassVar[str]

    def __init__(self, config: RunConfig, directory: RunDir) -> None: ...

    def start(self) -> None:
        """Before ranks start; a run that goes on is the same run to the tracker."""

    def log(self, stretch: Stretch) -> None:
        """About once a second, or for each step where steps are longer."""

    def finish(self, result: RunResult) -> None:
        """After the last step; the run directory is complete."""

    def fail(self, error: BaseException) -> None:
        """Instead of :meth:`finish`."""
