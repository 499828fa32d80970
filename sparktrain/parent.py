"""End with one's parent, whatever ends it: a process that outlives who started it trains on unseen.

Stock TorchDistributor leaves ranks training when torchrun is killed: torchelastic starts them in sessions of their own,
which no signal to the agent's group reaches.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path


def follow_parent(number: int = signal.SIGKILL) -> None:
    """Have this process get signal ``number`` when its parent ends; called again, another one.

    A process that is stopped gets SIGKILL and SIGCONT at once, all others only when it is continued."""
    parent = os.getppid()
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number)
        if os.getppid() != parent:  # it ended between the two calls
            os.kill(os.getpid(), number)
    elif not any(thread.name == _watch.__name__ for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(parent,), name=_watch.__name__, daemon=True).start()


def is_orphan(starter: int) -> bool:
    """Whether neither the parent of this process nor the parent's parent is process ``starter`` any more: of one that
    began when these were just ending, nobody will tell it."""
    parent = os.getppid()
    if sys.platform != "linux" or parent == starter:
        return parent == 1
    with suppress(OSError):
        return int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1]) != starter
    return True


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
