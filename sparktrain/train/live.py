"""The settings of a run as its changes leave them, the same on all ranks at every step."""

import json
from dataclasses import asdict
from pathlib import Path

from sparktrain.changes import Change, Changes, changed
from sparktrain.config import RunConfig
from sparktrain.train.world import World


class Live:
    """Settings of an attempt that goes on with ``first_step`` in ``run_dir``; ``base``: what the run began with."""

    def __init__(self, run_dir: Path, base: RunConfig, world: World, first_step: int) -> None:
        self._changes, self.base, self._world = Changes(run_dir), base, world
        self._taken: list[Change] = []
        self._known, self._now = 0, base
        self.take(first_step)

    def take(self, step: int) -> bool:
        """Take changes that wait, for ``step`` and after; whether ranks must start again for it. Every rank calls it
        before the same step."""
        first = len(self._taken)
        text = json.dumps([asdict(c) for c in self._changes.take(step)]) if self._world.rank == 0 else ""
        self._taken = [Change(**entry) for entry in json.loads(self._world.broadcast_bytes(text.encode()))]
        return any(change.kind == "cold" for change in self._taken[first:])

    def waits(self) -> bool:
        """Whether changes wait to be taken; only rank 0 knows."""
        return self._world.rank == 0 and len(self._changes.asked()) > len(self._taken)

    def at(self, step: int) -> RunConfig:
        """The settings of ``step``; the same object as long as nothing changes."""
        due = [change for change in self._taken if (change.step or 0) <= step]
        if len(due) != self._known:
            self._known, self._now = len(due), changed(self.base, due)
        return self._now
