"""What a rank puts into a checkpoint, written behind the loop's back, and how it goes on from one.

The loop stops for a copy of the tensors only; a thread writes them. Rank 0 writes what is the same everywhere, every
rank its own part of the strategy's state, its random numbers' state and its records; rank 0 then waits for all and
writes the manifest (``sparktrain/checkpoints.py``). No collective is called behind the loop, where it could meet
one of the loop's: ranks find each other's parts on disk.

State is a tree of dictionaries, lists, tuples, plain values and tensors. On disk the tensors are safetensors, and the
tree is JSON in the file's header: nothing is pickled.
"""

import json
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparktrain import failpoints, storage
from sparktrain.checkpoints import Manifest, Part, name_of, parts_of
from sparktrain.config import RunConfig
from sparktrain.errors import LaunchError, ModelError
from sparktrain.receipts import Receipt, Receipts
from sparktrain.results import StepRecord, write_records
from sparktrain.rundir import RunDir
from sparktrain.train import models
from sparktrain.train.strategies.contract import Strategy
from sparktrain.train.strategies.replicas.agreement import compare_digests, digest, exchange_digest
from sparktrain.train.world import World


class Checkpointer:
    """Saves checkpoints of attempt ``generation``, which began from ``start``; close it, or use it in ``with``.

    ``values`` are plain values that every checkpoint carries. What is entered in ``receipts`` becomes a part of the
    next checkpoint, or a file of its own at the end.
    """

    def __init__(
        self,
        directory: RunDir,
        config: RunConfig,
        world: World,
        generation: int,
        start: Manifest | None,
        values: dict[str, Any],
    ) -> None:
        self._directory, self._config, self._world, self._generation = directory, config, world, generation
        self._values, self._last = values, start
        self.receipts = Receipts(generation, world.rank, partial(directory.receipts, generation, world.rank))
        self._first_record = self._asked = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *failed: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=failed[0] is not None)
        if failed[0] is None:
            self.wait()
            self.receipts.write()

    def save(self, step: int, model: PreTrainedModel, strategy: Strategy, records: list[StepRecord]) -> None:
        """Save what the run is after ``step`` steps. Every rank calls it at the same step.

        Raises what went wrong with the one before, which is waited for; :class:`sparktrain.errors.Diverged` where what
        all ranks share is not the same on all.
        """
        self.wait()
        self._directory.check_newest(self._generation)
        shared = strategy.extract()
        if self._world.size > 1:
            compare_digests(exchange_digest(digest(list(shared.values())), self._world.device, None), step)
        state = strategy.state_dict()
        own = {"strategy": state["rank"], "random": _random_state(self._world.device)}
        trees: dict[str, Any] = {f"rank-{self._world.rank:05d}.safetensors": own}
        weights: dict[str, Tensor] = {}
        if self._world.rank == 0:
            trees["strategy.safetensors"] = state["shared"]
            weights = models.weights(model, shared)
        packed = {file: pack(tree) for file, tree in trees.items()}
        new, self._first_record, self._asked = records[self._first_record :], len(records), step
        failpoints.reach("checkpoint.copied", rank=self._world.rank, step=step, generation=self._generation)
        self._writing = self._thread.submit(self._write, step, model, weights, packed, new, self.receipts.take())

    def newest(self) -> int:
        """Steps of the newest checkpoint, once the one that is being written is there, whoever commits it."""
        self.wait()
        deadline = time.monotonic() + self._config.launch.collective_timeout
        while (found := self._directory.checkpoints.latest_step()) < self._asked and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def wait(self) -> None:
        """Until the checkpoint being written is there."""
        if self._writing is not None:
            try:
                self._writing.result()
            except OSError as error:
                raise LaunchError(
                    f"a checkpoint could not be written below {self._directory.path}: {error.strerror or error} "
                    "(earlier ones are whole); make room or mend the file system, then start the same command again"
                ) from None
            finally:
                self._writing = None

    def _write(
        self,
        step: int,
        model: PreTrainedModel,
        weights: dict[str, Tensor],
        packed: Mapping[str, tuple[dict[str, Tensor], str]],
        records: list[StepRecord],
        receipts: tuple[list[Receipt], list[Path]],
    ) -> None:
        files, rank = self._directory.checkpoints, self._world.rank
        name, at = name_of(step, self._generation), {"rank": rank, "step": step, "generation": self._generation}
        here = files.directory(name)
        here.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Part] = {}
        if rank == 0:
            with storage.room(here) as room:
                below = f"{here.relative_to(files.run_dir)}/"
                parts |= parts_of(room, models.write(model, weights, self._config, room), below)
        failpoints.reach("checkpoint.weights", **at)
        for file, (tensors, tree) in packed.items():
            content = safetensors.torch.save(tensors, {"tree": tree})
            parts |= files.write_part(here / file, content, self._last)
        rows = self._directory.records(self._generation, rank, step)
        parts |= files.write_part(rows, write_records(rank, records), None)
        given, written = receipts
        parts |= files.write_part(
            self._directory.receipts(self._generation, rank, step), self.receipts.content(given), None
        )
        parts |= parts_of(files.run_dir, written)
        files.seal(name, rank, parts)
        failpoints.reach("checkpoint.parts", **at)
        if rank == 0:
            parent = self._last.name if self._last else None
            run = (self._values, files.run_id())
            begun = Manifest(name, step, self._generation, parent, self._world.size, {}, *run)
            self._directory.check_newest(self._generation)
            self._last = files.commit(begun, self._config.launch.collective_timeout)
            failpoints.reach("checkpoint.committed", **at)
            files.retain(self._config.checkpoint.keep_last, self._config.checkpoint.keep_every)


def choose(directory: RunDir, world: World) -> Manifest | None:
    """The newest whole checkpoint, the same on all ranks; None: start from the first step. Damaged ones are named."""
    text = ""
    if world.rank == 0:
        found, damages = directory.checkpoints.newest()
        directory.checkpoints.sweep()
        for damage in damages:
            print(f"{damage}: an older one is used", flush=True)
        text = found.name if found else ""
    name = world.broadcast_bytes(text.encode()).decode()
    if not name:
        return None
    start = directory.checkpoints.read(name)
    if (spec := directory.plan_spec()) and start.step > spec.steps:
        raise ModelError(f"checkpoint {name} is of step {start.step}, the plan ends at step {spec.steps}: take it out")
    return start


def restore(directory: RunDir, start: Manifest, strategy: Strategy, world: World) -> None:
    """Bring ``strategy``, whose parameters are loaded, and this rank's random numbers to where ``start`` was taken.

    In a world of another size, ranks that ``start`` does not know get the shared part only: see each strategy.
    """
    here = directory.checkpoints.directory(start.name)
    state = {"shared": read(here / "strategy.safetensors", world.device), "rank": None}
    if world.rank < start.world:
        own = read(here / f"rank-{world.rank:05d}.safetensors", world.device)
        state["rank"] = own["strategy"]
        torch.set_rng_state(own["random"]["cpu"].cpu())
        if world.device.type == "cuda" and "cuda" in own["random"]:
            torch.cuda.set_rng_state(own["random"]["cuda"].cpu(), world.device)
    strategy.load_state_dict(state)


def pack(tree: Any) -> tuple[dict[str, Tensor], str]:
    """Copies of the tensors of ``tree`` in this machine's memory, by number, and the tree without them as JSON."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {"dict": [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {type(value).__name__: [plain(item) for item in value]}
        assert value is None or isinstance(value, bool | int | float | str), f"no plain value: {value!r}"
        return value

    return tensors, json.dumps(plain(tree))


def read(file: Path, device: torch.device) -> Any:
    """The tree that :func:`pack` was given, from ``file``, on ``device``."""
    try:
        with (
            storage.at_hand(file) as here,
            safetensors.safe_open(here, framework="pt", device=str(device)) as opened,
        ):
            tree = json.loads(opened.metadata()["tree"])
            return _unpack(tree, {key: opened.get_tensor(key) for key in opened.keys()})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelError(f"checkpoint file {file} cannot be read: {error}") from None


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
