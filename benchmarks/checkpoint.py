"""How long the loop stands still for a checkpoint, and how much slower the steps are while one is written.

    python benchmarks/checkpoint.py [--steps 40] [--every 8]

One rank, one thread, a Llama of 19 million parameters under AdamW (230 MB per checkpoint). Prints medians: a step
with nothing being written, a step during a write, and the stop itself.
"""

import argparse
import statistics
import tempfile
import time

import torch

from sparktrain.checkpoints import name_of
from sparktrain.config import RunConfig
from sparktrain.rundir import RunDir
from sparktrain.train import checkpoint, models
from sparktrain.train.batch import Batch
from sparktrain.train.evaluate import token_losses
from sparktrain.train.strategies import STRATEGIES
from sparktrain.train.world import start_world

SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as path, start_world(threads=1, timeout_seconds=60) as world:
        config = RunConfig.model_validate({"model": {"sizes": {**SIZES, "vocab_size": 16384}}})
        directory, number = RunDir(path), RunDir(path).new_generation()
        model = models.build(config, world)
        strategy = STRATEGIES["adamw"].build(dict(model.named_parameters()), config.strategy, config.optimizer, 0)
        batch = Batch(torch.randint(0, 16384, (4, 257), generator=torch.Generator().manual_seed(0)))
        alone, beside, stops = [], [], []
        with checkpoint.Checkpointer(directory, config, world, number, None, {}) as saver:
            for step in range(1, arguments.steps + 1):
                writing = saver._writing is not None and not saver._writing.done()
                began = time.perf_counter()
                model.zero_grad()
                (token_losses(model, batch) / 1024).backward()
                strategy.step(1e-4, 1024)
                (beside if writing else alone).append(time.perf_counter() - began)
                if step % arguments.every == 0:
                    saver.wait()  # what is measured is the stop, not a queue of writes
                    began = time.perf_counter()
                    saver.save(step, model, strategy, [])
                    stops.append(time.perf_counter() - began)
        size = sum(part.num_bytes for part in directory.checkpoints.read(name_of(step, number)).parts.values())
        step_alone = statistics.median(alone[2:])
        print(f"{model.num_parameters():,} parameters, {size / 1e6:.0f} MB per checkpoint")
        print(f"step                 {step_alone:.3f} s")
        print(f"step during a write  {statistics.median(beside):.3f} s, {statistics.median(beside) / step_alone:.2f} x")
        print(f"stop                 {statistics.median(stops):.3f} s, {statistics.median(stops) / step_alone:.2f} x")


if __name__ == "__main__":
    main()
