"""What ranks agree on between the backward pass and the update: is every loss a number, shall we save, shall we stop.

All must do the same in the same step, so what any of them was told is shared in one small all-reduce: in every step,
or, where ranks take steps of their own that nobody should wait for, in every tenth.

A run is asked by a file in its directory, ``SAVE``, ``STOP`` or a change of settings, or by SIGTERM to any of its
ranks, which is what a cluster manager sends before it takes a machine away. A rank whose parent process is gone, with
its executor or its torchrun, asks the same in its last seconds; but nobody wanted that run to end, so it is to be
started again.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from sparktrain import heartbeat, storage
from sparktrain.beside import beside
from sparktrain.errors import Orphaned, SparktrainError, Stopped
from sparktrain.parent import follow_parent
from sparktrain.rundir import SAVE, STOP, RunDir
from sparktrain.train.world import World

_EVERY_OF_LOCAL_STEPS = 10
_LOOKED_SECONDS = 1.0
_CHANGE = "changes"


class Asked(NamedTuple):
    """What to do after this step; ``seconds``: waited for the others to say so. ``orphan``: to stop because that rank's
    parent is gone. ``skip``: leave out its update."""

    save: bool = False
    stop: bool = False
    change: bool = False
    seconds: float = 0.0
    orphan: int | None = None
    skip: bool = False


class Requests:
    """Those to the run in ``directory``. ``local``: its ranks take steps of their own; ``waits``: whether a change of
    settings does, as far as this rank knows. ``skips``: what to do about a loss that is not a number, see
    ``nonfinite.py``."""

    def __init__(
        self,
        directory: RunDir,
        world: World,
        local: bool,
        waits: Callable[[], bool],
        skips: Callable[[int, float, int], bool],
    ) -> None:
        self._directory, self._world, self._change_waits = directory, world, waits
        self._skips = skips
        self._every = _EVERY_OF_LOCAL_STEPS if local else 1
        self._terminated, self._parent = threading.Event(), os.getppid()
        self._looked, self._looking = set[str](), threading.Lock()
        self._looks_ahead = False
        self.asked = Asked()

    def agree(self, step: int, loss_sum: float, leave_out: bool = False) -> Asked:
        """What all ranks do after ``step``, kept in ``asked`` too. ``leave_out``: they skip it, whatever its loss.
        Raises what ``skips`` does, before anything is updated."""
        heartbeat.at("agrees")
        world, finite = self._world, leave_out or math.isfinite(loss_sum)
        due = step % self._every == self._every - 1
        told, ended = due and self._told(STOP), due and self._terminated.is_set()
        orphan = ended and os.getppid() != self._parent
        asked = [due and self._told(SAVE), told or (ended and not orphan), due and self._told(_CHANGE)]
        said = [0.0 if finite else world.rank + 1.0, world.rank + 1.0 if orphan else 0.0, *map(float, asked)]
        seconds = 0.0
        if due and world.size > 1:
            began = time.perf_counter()
            said = world.largest(*said)
            seconds = time.perf_counter() - began
        bad, lost, (save, stop, change) = int(said[0]), int(said[1]), (value > 0 for value in said[2:])
        skip = leave_out or (bad > 0 and self._skips(step, loss_sum, bad - 1))
        stopping, orphan_rank = stop or lost > 0, lost - 1 if lost and not stop else None
        self.asked = Asked(save or stopping, stopping, change, seconds, orphan_rank, skip)
        return self.asked

    def stopped(self, done: int, steps: int) -> SparktrainError:
        """What the run ends with that was asked to stop after ``done`` of ``steps``."""
        where = f"after step {done} of {steps}"
        if self.asked.orphan is not None:
            return Orphaned(f"what started rank {self.asked.orphan} is gone: ended with a checkpoint {where}")
        return Stopped(f"stopped {where}, as asked; the same command goes on from there")

    def met(self) -> None:
        """What was asked for is done."""
        if self._world.rank == 0:
            with self._looking:
                self._directory.request_path(SAVE).unlink(missing_ok=True)
                self._looked.discard(SAVE)

    @contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """While inside, a thread looks what is asked for where each look is a request to a server."""
        if self._world.rank > 0 or storage.is_local(self._directory.path):
            yield
            return

        def look(over: threading.Event) -> None:
            while not over.wait(_LOOKED_SECONDS):
                with self._looking, suppress(OSError, SparktrainError):
                    self._looked = {name for name in (SAVE, STOP, _CHANGE) if self._look(name)}

        self._looks_ahead = True
        try:
            with beside("requests", look):
                yield
        finally:
            self._looks_ahead = False

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
        # SIGCONT, of our parent's end: a rank that is stopped then gets no other that it can handle.
        heeded = (signal.SIGTERM, signal.SIGCONT)
        before = {number: signal.signal(number, lambda number, frame: None) for number in heeded}
        wakeup = signal.set_wakeup_fd(write)
        watcher = threading.Thread(target=self._heed, args=(read, grace), daemon=True)
        watcher.start()
        follow_parent(signal.SIGCONT)
        try:
            yield
        finally:
            follow_parent()
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(write)

    def _heed(self, pipe: int, grace: float) -> None:
        while number := os.read(pipe, 1):
            if number[0] == signal.SIGTERM or os.getppid() != self._parent:
                self._terminated.set()
                last_resort = threading.Timer(grace, os._exit, [128 + signal.SIGTERM])
                last_resort.daemon = True
                last_resort.start()
        os.close(pipe)

    def _told(self, name: str) -> bool:
        if self._world.rank > 0:
            return False
        return name in self._looked if self._looks_ahead else self._look(name)

    def _look(self, name: str) -> bool:
        return self._change_waits() if name == _CHANGE else self._directory.request_path(name).exists()
