"""A program that takes a rank's steps, round after round: its data, its device, and what it remembers.

A batch of the job is a step's share of this rank, as a ``micro_epoch`` of kind ``sharded-static``. Its payload says::

    dataset_root, shard_paths   one .npz file: tokens [n, L], and labels and position_ids [n, L] where the data has them
    microshards_per_batch       n
    step, learning_rate         of the plan, and by the run's schedule

``microshard_ids`` and ``ordinals`` are the plan's numbers of the n sequences. What the files hold is what the rank
would have trained on itself: every format, mirror, mask and packed document is read before the program is started.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparktrain.config import InnerLoop
from sparktrain.train import parameter_pack as packs
from sparktrain.train.external.blob import StateBlob
from sparktrain.train.external.inner import Command, InnerResult, InnerRound, micro_epoch, run_inner
from sparktrain.train.external.process import own_device, search_path


@dataclass(frozen=True)
class StepData:
    """A rank's share of a step. arrays: ``[n, L]``, by the names that they have in the file."""

    step: int
    learning_rate: float
    microshards: Sequence[int]
    arrays: Mapping[str, "np.ndarray[Any, Any]"]


class Trainer:
    """The program ``command`` for ``model``, as rank ``rank`` of run ``run_id``; what it remembers stands where an
    optimizer's state would.

    Each round it works in a directory of its own below TMPDIR. One that a killed rank left there is removed by the next
    that is started on that machine.
    """

    def __init__(self, model: torch.nn.Module, command: Command, run_id: str, rank: int) -> None:
        self._model, self._run_id, self._rank = model, run_id, rank
        self._rounds = 0
        self._blob: StateBlob | None = None
        # Of the parameters alone: configs say more after a checkpoint than before it.
        self._schema = packs.layout(model).layout_hash
        device = next(model.parameters()).device
        ours = {
            "PATH": search_path(),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        if device.type == "cuda":
            ours |= own_device(device.index)
        self._command = replace(command, env=ours | dict(command.env))
        self._prefix = f"sparktrain-{run_id}-rank{rank:05d}-"
        for left in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
            shutil.rmtree(left, ignore_errors=True)

    def train(self, steps: Sequence[StepData]) -> InnerResult:
        """Bring the model's parameters to where the program ends. Where ``run_inner`` raises, nothing is changed."""
        with tempfile.TemporaryDirectory(prefix=self._prefix, ignore_cleanup_errors=True) as scratch:
            round = InnerRound(
                run_id=self._run_id,
                rank=self._rank,
                round=self._rounds,
                num_inner_steps=len(steps),
                batches=[self._batch(Path(scratch), data) for data in steps],
                model_schema_hash=self._schema,
                inner_optimizer_state=self._blob,
            )
            state = self._model.state_dict()
            result = run_inner(state, self._command, round, Path(scratch))
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(result.state[name])
        self._blob = result.inner_optimizer_state
        self._rounds += 1
        return result

    def state_dict(self) -> dict[str, Any]:
        """What the program returned last, as a tensor of bytes under "state"; {} where that is nothing."""
        blob = self._blob
        if blob is None:
            return {"rounds": self._rounds, "state": {}}
        data = torch.frombuffer(bytearray(blob.data), dtype=torch.uint8) if blob.data else torch.empty(0)
        return {
            "rounds": self._rounds,
            "state": {"encoding": blob.encoding, "content_id": blob.content_id, "data": data},
        }

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Inverse of :meth:`state_dict`; ``ModelError`` where the bytes are not those that were saved."""
        self._rounds, saved = state_dict["rounds"], state_dict["state"]
        self._blob = None
        if saved:
            blob = StateBlob(saved["encoding"], _bytes(saved["data"]), saved["content_id"])
            blob.check()
            self._blob = blob

    def _batch(self, directory: Path, data: StepData) -> dict[str, Any]:
        file = directory / f"step-{data.step:09d}.npz"
        # Half the bytes; no vocabulary has two billion tokens.
        np.savez(file, **{name: array.astype(np.int32) for name, array in data.arrays.items()})  # type: ignore[arg-type]
        payload = {
            "dataset_root": str(directory),
            "shard_paths": [str(file)],
            "microshards_per_batch": len(data.microshards),
            "step": data.step,
            "learning_rate": data.learning_rate,
        }
        lease = f"{self._run_id}-{data.step}-{self._rank}"
        names, numbers = [str(number) for number in data.microshards], list(data.microshards)
        return micro_epoch(lease, names, numbers, file.stat().st_size, "sharded-static", payload)


def command_of(settings: InnerLoop) -> Command:
    return Command(
        argv=settings.command,
        env=settings.env,
        module_search_roots=tuple(map(str, settings.module_search_roots)),
        timeout=settings.timeout,
        require_exact_steps=settings.require_exact_steps,
        state_dict_filter=packs.StateDictFilter(settings.include_globs, settings.exclude_globs),
    )


def _bytes(data: Tensor) -> bytes:
    return data.cpu().numpy().tobytes()
