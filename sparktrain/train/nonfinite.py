"""What happens where a loss or a gradient is not a number: ``train.on_nonfinite``."""

import math
from collections.abc import Callable
from typing import NoReturn

from sparktrain.changes import Changes
from sparktrain.config import RunConfig
from sparktrain.errors import Changed, Diverged
from sparktrain.rundir import RunDir
from sparktrain.train.live import Live
from sparktrain.train.world import World


class NonFinite:
    """The policy of a rank in the run of ``directory``. ``local``: its ranks take steps of their own; ``refused``: the
    strategy sees to gradients by itself; ``saved``: steps of the newest checkpoint, once that which is being written is
    there."""

    def __init__(
        self, directory: RunDir, world: World, live: Live, local: bool, refused: bool, saved: Callable[[], int]
    ) -> None:
        self._directory, self._world, self._live, self._local, self._refused = directory, world, live, local, refused
        self._saved = saved
        self._skipped, self._last = 0, -1

    def skips_loss(self, step: int, loss: float, rank: int) -> bool:
        """Whether this rank, whose loss this is, leaves out the update of ``step``, in which that of ``rank`` is not a
        number. Raises :class:`Diverged` where the run is to stop, :class:`Changed` where it is to go back."""
        finite = math.isfinite(loss)
        if self._local and finite and self._live.at(step).train.on_nonfinite != "stop":
            return False  # another rank's step of its own
        return self._skips(step, f"loss is {'not a number' if finite else loss} in step {step} on rank {rank}", rank)

    def skips_gradient(self, step: int, norm: float) -> bool:
        """The same of a gradient's norm: of this rank's, or of all ranks' mean, which is the same on all."""
        if math.isfinite(norm) or self._refused:
            return False
        rank, where = (self._world.rank, f" on rank {self._world.rank}") if self._local else (0, "")
        return self._skips(step, f"gradient norm is {norm} in step {step}{where}", rank)

    def _skips(self, step: int, found: str, rank: int) -> bool:
        """``rank``: that which speaks of it."""
        config = self._live.at(step)
        if config.train.on_nonfinite == "rollback":
            self._go_back(step, found, rank, config)
        most = config.train.max_skipped if config.train.on_nonfinite == "skip" else 0
        self._skipped = self._skipped if self._last == step - 1 else 0
        if self._skipped >= most:
            after = f" and {self._skipped} before it" if self._skipped else ""
            raise Diverged(f"{found}{after}: lower optimizer.lr or check the data")
        self._skipped, self._last = self._skipped + 1, step
        if rank == self._world.rank:
            print(f"{found}: skipped ({self._skipped} of {most} in a row)", flush=True)
        return True

    def _go_back(self, step: int, found: str, rank: int, config: RunConfig) -> NoReturn:
        """Leave word for all attempts to come, once, and end this one."""
        saved, known = self._saved(), config.train.left_out
        if not self._local:  # rank 0 is the one that commits
            saved = int(self._world.broadcast_bytes(str(saved).encode()))
            rank = 0
        if not saved:
            raise Diverged(f"{found}, with no checkpoint to go back to: lower optimizer.lr or checkpoint.every")
        if (times := len(known) - len(self._live.base.train.left_out)) >= config.train.max_skipped:
            raise Diverged(f"{found}, after going back {times} times: lower optimizer.lr or check the data")
        if rank == self._world.rank:
            left_out = (*known, (saved, step))
            after = config.model_copy(update={"train": config.train.model_copy(update={"left_out": left_out})})
            Changes(self._directory.path).ask("hot", config, after, step=saved)
        if not self._local:  # nobody ends before it is written down
            self._world.broadcast_bytes(b"")
        raise Changed(f"{found}: back to the checkpoint after step {saved}, without the updates from there to this one")
