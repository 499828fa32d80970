"""Named places where a test can make a process fail, as disks, networks and kernels do.

::

    SPARKTRAIN_FAILPOINT="checkpoint.parts@rank=1,step=4:kill"

kills rank 1 when it has written its parts of the checkpoint after step 4. ``@...`` may name any of what the place
knows (rank, step, generation) and may be missing; several are separated by ``;``. What can happen: ``kill`` (SIGKILL),
``stop`` (SIGSTOP), ``raise`` (RuntimeError), ``full`` (no space left on device), ``exit=N``, ``delay=MILLISECONDS``.

Nothing is armed unless ``worker.py`` finds the variable; an unarmed place costs a look at an empty list.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass

PLACES = (
    "start",  # the rank knows its place in the world
    "loaded",  # model and strategy are there, no step was taken
    "batch",  # the step's tokens are there
    "gradient",  # the backward passes are done, nothing is updated
    "updated",  # the strategy has taken its step
    "checkpoint.copied",  # the loop may go on; nothing is on disk
    "checkpoint.weights",  # the model's part is on disk, others are not
    "checkpoint.parts",  # all parts of this rank are on disk
    "checkpoint.manifest",  # all ranks' parts are there, the manifest is not
    "checkpoint.committed",  # the manifest is there, older checkpoints are not removed yet
    "trained",  # after the last step
    "saved",  # the final model is there, the rank's output file is not
)


@dataclass(frozen=True)
class _Failpoint:
    place: str
    where: dict[str, int]
    what: str


_armed: list[_Failpoint] = []


def arm(text: str) -> None:
    """Arm the failpoints that ``text`` names, and no others; ``ValueError``: it names none."""
    _armed[:] = [_parse(one.strip()) for one in text.split(";") if one.strip()]


def reach(place: str, **here: int) -> None:
    """Fail here if that is armed."""
    for failpoint in _armed:
        if failpoint.place == place and failpoint.where.items() <= here.items():
            _fail(failpoint.what, place)


def _parse(text: str) -> _Failpoint:
    left, _, what = text.partition(":")
    place, _, conditions = left.partition("@")
    try:
        where = {key: int(value) for key, value in (c.split("=") for c in conditions.split(",") if c)}
        action, _, number = what.partition("=")
        if place not in PLACES or action not in ("kill", "stop", "raise", "full", "exit", "delay"):
            raise ValueError
        if action in ("exit", "delay"):
            int(number)
    except ValueError:
        raise ValueError(
            f"failpoint {text!r} is none: expected PLACE@rank=R,step=S:WHAT with a place of {', '.join(PLACES)} "
            "and kill, stop, raise, full, exit=N or delay=MILLISECONDS"
        ) from None
    return _Failpoint(place, where, what)


def _fail(what: str, place: str) -> None:
    action, _, number = what.partition("=")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "exit":
        os._exit(int(number))
    elif action == "delay":
        time.sleep(int(number) / 1000)
    elif action == "full":
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (failpoint {place})")
    else:
        raise RuntimeError(f"failpoint {place}")
