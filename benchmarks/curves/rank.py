"""One rank of one run: a small Llama, this rank's half of every batch, any strategy; what came of it goes to rank 0.

Every run of a seed starts at the same weights and sees the same batches: rank r of two takes the r-th half of each.
The lone worker is rank 0 without the other. Losses are nats per token of the weights that ranks share at that moment.
"""

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sparktrain.config import Optimizer, Schedule
from sparktrain.config.strategies import AdamW, Diloco, Distro, Sparseloco
from sparktrain.train.schedule import lr_at
from sparktrain.train.strategies import STRATEGIES
from sparktrain.train.strategies.replicas.local_steps import LocalSteps

SECTIONS = {"adamw": AdamW, "distro": Distro, "diloco": Diloco, "sparseloco": Sparseloco}
# Sequences that losses are of, from all over the held-out split; and sequences of a forward pass.
HELD_OUT, MICRO = 384, 16


class Tokens:
    """Windows of S + 1 tokens of a directory that jobs/tokenize.py made, as int64 [sequences, S + 1]."""

    def __init__(self, directory: Path, length: int) -> None:
        shards = [np.memmap(path, dtype=np.uint16, mode="r") for path in sorted(directory.glob("*.ds"))]
        self._places = [(shard, i) for shard in shards for i in range((len(shard) - 1) // length)]
        self._length = length

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, numbers: Any) -> torch.Tensor:
        rows = [self._places[n][0][(i := self._places[n][1] * self._length) : i + self._length + 1] for n in numbers]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def losses(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Sum over the targets of ``rows``."""
    logits = model(rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def held_out(model: LlamaForCausalLM, tokens: Tokens, shared: dict[str, torch.Tensor], rank: int, world: int) -> float:
    """Loss of the ``shared`` weights; each rank measures its part of the sequences, the model stays as it is."""
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.copy_(shared[name])
    numbers = np.linspace(0, len(tokens) - 1, min(HELD_OUT, len(tokens)), dtype=int)
    sums = torch.zeros(2, dtype=torch.float64)
    for i in range(0, len(numbers), MICRO)[rank::world]:
        rows = tokens[numbers[i : i + MICRO]]
        sums += torch.tensor([float(losses(model, rows)), rows[:, 1:].numel()], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(sums)
    for name, p in model.named_parameters():
        p.copy_(own[name])
    return float(sums[0] / sums[1])


def made(run: dict[str, Any], model: LlamaForCausalLM) -> Any:
    """The run's strategy, as the loop of sparktrain would make it, or another library's under the same methods."""
    settings = dict(run["strategy"])
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(lr=run["lr"])
    if settings["kind"] in SECTIONS:
        section = SECTIONS[settings["kind"]](**settings)
        return STRATEGIES[settings["kind"]].build(parameters, section, optimizer, run["steps"])
    import others

    return others.KINDS[settings.pop("kind")](model, optimizer, **settings)


def train(rank: int, world: int, run: dict[str, Any], data: str, meeting: str, output: str) -> None:
    """``run`` as in ``__main__.py``; rank 0 writes a line of JSON to ``output``."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", store=dist.FileStore(meeting, world), rank=rank, world_size=world)
    torch.manual_seed(run["seed"])
    model = LlamaForCausalLM(LlamaConfig(**run["model"]))
    length = run["sequence_length"]
    training, heldout = Tokens(Path(data, "train"), length), Tokens(Path(data, "heldout"), length)
    order = np.random.default_rng(run["seed"]).permutation(len(training))
    batch, part = run["tokens_per_step"] // length, run["tokens_per_step"] // length // 2
    schedule = Schedule(warmup_steps=run["warmup_steps"])
    strategy, curve, spent, began = made(run, model), [], 0.0, time.perf_counter()
    for step in range(run["steps"]):
        numbers = order[np.arange(step * batch + rank * part, step * batch + (rank + 1) * part) % len(order)]
        model.zero_grad(set_to_none=True)
        for rows in training[numbers].split(MICRO):
            (losses(model, rows) / (part * length)).backward()
        before = time.thread_time()
        strategy.average_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        strategy.step(lr_at(step, schedule, run["lr"], run["steps"]), part * length)
        spent += time.thread_time() - before
        done = step + 1
        if done == run["steps"]:
            strategy.sync()
        if done == run["steps"] or done % run["eval_every"] == 0:
            loss = held_out(model, heldout, strategy.extract(), rank, world)
            traffic = strategy.traffic
            curve.append([done, loss, traffic.payload_bytes, traffic.bytes_sent, traffic.bytes_received])
    if rank == 0:
        every = strategy.cadence.every if isinstance(strategy, LocalSteps) else getattr(strategy, "every", 1)
        finish(run, curve, every, spent, time.perf_counter() - began, output)
    dist.barrier()
    dist.destroy_process_group()


def finish(run: dict[str, Any], curve: list[list[float]], every: int, spent: float, wall: float, output: str) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    result = {
        "loss": curve[-1][1],
        "sync_every": every,
        "curve": curve,
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "strategy_cpu_seconds": round(spent, 2),
        "wall_seconds": round(wall, 1),
    }
    Path(output).write_text(json.dumps(result))
