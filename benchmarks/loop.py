"""Train loop of one rank against a bare PyTorch loop: same model, batches and optimizer, step by step in turn.

    python benchmarks/loop.py [--steps 60]

Prints tokens per CPU second of both and their ratio, medians over steps. Both loops run in this process and take turns
at every step, so that a machine whose speed drifts slows both.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sparktrain import plan
from sparktrain.config import RunConfig
from sparktrain.rundir import RunDir
from sparktrain.tokens import ds
from sparktrain.train import loop, models
from sparktrain.train.live import Live
from sparktrain.train.nonfinite import NonFinite
from sparktrain.train.requests import Requests
from sparktrain.train.strategies import STRATEGIES, Strategy
from sparktrain.train.world import World, start_world

VOCAB, LENGTH, BATCH, MICRO = 4096, 256, 8, 8
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
}


def prepare(path: Path, steps: int) -> tuple[RunDir, RunConfig, plan.PlanSpec]:
    """A run directory with a plan over random tokens, without Spark."""
    shard = ds.write(path / "a.ds", [np.random.default_rng(0).integers(0, VOCAB, 500_000)], VOCAB, "random")
    spec = plan.PlanSpec((shard,), LENGTH, BATCH, steps, seed=0)
    directory = RunDir(path / "run")
    directory.plan.mkdir(parents=True)
    rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
    pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
    config = {
        "model": {"sizes": SIZES},
        "train": {"steps": steps, "total_batch": BATCH, "micro_batch": MICRO},
        "data": {"path": str(path), "sequence_length": LENGTH},
    }
    return directory, RunConfig.model_validate(config), spec


def bare_step(model: torch.nn.Module, config: RunConfig, batches: list[torch.Tensor]) -> Callable[[int], None]:
    """The loop anyone would write."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr, betas=config.optimizer.betas, fused=True)

    def step(i: int) -> None:
        optimizer.zero_grad()
        for tokens in batches[i].split(MICRO):
            logits = model(input_ids=tokens[:, :-1]).logits
            (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) * len(tokens) / BATCH).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()

    return step


def ready(
    run: RunDir, config: RunConfig, spec: plan.PlanSpec, world: World, model: PreTrainedModel, strategy: Strategy
) -> loop.Training:
    """A rank that is ready for its steps."""
    live = Live(run.path, config, world, 0)
    nonfinite = NonFinite(run, world, live, strategy.local, strategy.refuses, lambda: 0)
    requests = Requests(run, world, strategy.local, live.waits, nonfinite.skips_loss)
    return loop.Training(run, config, spec, world, model, strategy, live, requests, nonfinite)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as directory, start_world(threads=1, timeout_seconds=60) as world:
        run, config, spec = prepare(Path(directory), steps)
        ours, theirs = models.build(config, world), models.build(config, world)
        strategy = STRATEGIES["adamw"].build(
            dict(ours.named_parameters()), config.strategy, config.optimizer, config.train.steps
        )
        step = bare_step(theirs, config, [batch.tokens.long() for batch in loop.Batches(run, spec, 0, 1)])
        seconds: dict[str, list[float]] = {"sparktrain": [], "bare": []}
        steps_of_ours = loop._steps(ready(run, config, spec, world, ours, strategy))
        for i in range(steps):
            for name, act in (("sparktrain", lambda: next(steps_of_ours)), ("bare", lambda i=i: step(i))):
                began = time.process_time()
                act()
                seconds[name].append(time.process_time() - began)
        warm = {name: values[5:] for name, values in seconds.items()}
        for name, values in warm.items():
            print(f"{name:<11} {BATCH * LENGTH / statistics.median(values):>8,.0f} tokens per CPU second")
        ratios = [bare / ours for ours, bare in zip(warm["sparktrain"], warm["bare"], strict=True)]
        print(f"sparktrain / bare: median {statistics.median(ratios):.3f}, quartiles", end=" ")
        print(" ".join(f"{q:.3f}" for q in statistics.quantiles(ratios, n=4)))


if __name__ == "__main__":
    main()
