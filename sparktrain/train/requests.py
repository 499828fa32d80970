"""What ranks agree on between the backward pass and the update: is every loss a number, shall we save, shall we stop.

All must do the same in the same step, so what any of them was told is shared in one small all-reduce: in every step,
or, where ranks take steps of their own that nobody should wait for, in every tenth.

A run is asked by a file in its directory, ``SAVE``, ``STOP`` or a change of settings, or by SIGTERM to any of its
ranks, which is what a cluster manager sends before it takes a machine away.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sparktrain.errors import Diverged
from sparktrain.parent import follow_parent
from sparktrain.rundir import SAVE, STOP, RunDir
from sparktrain.train.world import World

_EVERY_OF_LOCAL_STEPS = 10


class Asked(NamedTuple):
    """What to do after this step; ``seconds``: waited for the others to say so."""

    save: bool = False
    stop: bool = False
    change: bool = False
    seconds: float = 0.0


class Requests:
    """Those to the run in ``directory``. ``local``: its ranks take steps of their own; ``waits``: whether a
    change of settings does, as far as this rank knows."""

    def __init__(self, directory: RunDir, world: World, local: bool, waits: Callable[[], bool]) -> None:
        self._directory, self._world, self._change_waits = directory, world, waits
        self._every = _EVERY_OF_LOCAL_STEPS if local else 1
        self._terminated = threading.Event()
        self.asked = Asked()

    def agree(self, step: int, loss_sum: float) -> Asked:
        """What all ranks do after ``step``, kept in ``asked`` too. ``Diverged``, before anything is updated, where a
        loss is not a number."""
        world, finite = self._world, math.isfinite(loss_sum)
        due = step % self._every == self._every - 1
        stop = due and (self._told(STOP) or self._terminated.is_set())
        asked = [due and self._told(SAVE), stop, due and self._change_waits()]
        said, seconds = [0.0 if finite else world.rank + 1.0, *map(float, asked)], 0.0
        if due and world.size > 1:
            began = time.perf_counter()
            said = world.largest(*said)
            seconds = time.perf_counter() - began
        bad, (save, stop, change) = int(said[0]), (value > 0 for value in said[1:])
        if bad:
            which = f"{loss_sum} in step {step}" if not finite else f"not a number in step {step}"
            raise Diverged(f"loss is {which} on rank {bad - 1}: lower optimizer.lr or check the data")
        self.asked = Asked(save or stop, stop, change, seconds)
        return self.asked

    def met(self) -> None:
        """What was asked for is done."""
        if self._world.rank == 0:
            self._directory.request_path(SAVE).unlink(missing_ok=True)

    @contextmanager
    def heeding_sigterm(self, grace: float) -> Iterator[None]:
        """SIGTERM, and the end of the parent process, is a request to stop while inside; one that is not met in
        ``grace`` seconds ends the process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Python runs handlers between the main thread's instructions, and that may be deep inside a collective which
        # never returns; the number of a signal is in the pipe at once.
        read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        wakeup = signal.set_wakeup_fd(write)
        watcher = threading.Thread(target=self._heed, args=(read, grace), daemon=True)
        watcher.start()
        follow_parent(signal.SIGTERM)
        try:
            yield
        finally:
            follow_parent()
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGTERM, before)
            os.close(write)

    def _heed(self, pipe: int, grace: float) -> None:
        while number := os.read(pipe, 1):
            if number[0] == signal.SIGTERM:
                self._terminated.set()
                last_resort = threading.Timer(grace, os._exit, [128 + signal.SIGTERM])
                last_resort.daemon = True
                last_resort.start()
        os.close(pipe)

    def _told(self, name: str) -> bool:
        return self._world.rank == 0 and self._directory.request_path(name).exists()
