"""From the driver's call to the first training step: sparktrain's launches, plain torchrun and stock TorchDistributor.

    python benchmarks/launch.py [--rounds 5]

All start the same run directory with two ranks; one Spark session, local[2], warm. Prints seconds and the ratio to
plain torchrun, medians over rounds in which every launcher takes its turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import SparkSession

from sparktrain.config import RunConfig
from sparktrain.results import RankResult
from sparktrain.rundir import RunDir
from sparktrain.spark import driver, launch, preflight, task
from sparktrain.tokens import ds
from sparktrain.worker import run_rank

os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's own choice is the first python3 of the PATH

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def prepare(spark: SparkSession, path: Path) -> RunDir:
    """A run of two ranks that has been run once."""
    (path / "train").mkdir()
    ds.write(path / "train" / "a.ds", [np.arange(20_000) % 512], 512, "count")
    config = {
        "run": {"dir": str(path / "run")},
        "data": {"path": str(path / "train"), "sequence_length": 32},
        "model": {"sizes": SIZES},
        "train": {"steps": 2, "total_batch": 8, "micro_batch": 4},
        "checkpoint": {"every": 0},  # each start is to take the first step
        "launch": {"ranks": 2},
    }
    driver.run(spark, RunConfig.model_validate(config))
    return RunDir(path / "run")


def launchers(spark: SparkSession, directory: RunDir) -> dict[str, Callable[[], object]]:
    def ours(mode: str, launcher: str) -> Callable[[], object]:
        def start() -> None:
            number = directory.new_generation()
            job = task.Job(
                *(str(directory.path), str(directory.logs(number)), number, "bench", preflight.import_path(), 1),
                *(launcher, 4.0),
            )
            launch.launch(spark, job, 2, mode == "local", use_gpu=False)

        return start

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    by_hand = [*torchrun, "-m", "sparktrain.worker", str(directory.path)]
    stock = TorchDistributor(num_processes=2, local_mode=False, use_gpu=False)
    return {
        "plain torchrun": lambda: subprocess.run(by_hand, check=True, capture_output=True),
        "sparktrain, local": ours("local", "torchrun"),
        "sparktrain, barrier stage, torchrun": ours("executors", "torchrun"),
        "sparktrain, barrier stage, direct": ours("executors", "direct"),
        "stock TorchDistributor, barrier stage": lambda: stock.run(run_rank, str(directory.path)),
    }


def seconds_to_first_step(directory: RunDir, start: Callable[[], object]) -> float:
    began = time.time()
    start()
    outcomes = [o for o in directory.outcomes(directory.latest_generation()) if isinstance(o, RankResult)]
    return max(o.first_step_at for o in outcomes) - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.log.level", "ERROR")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    with tempfile.TemporaryDirectory() as path:
        directory = prepare(spark, Path(path))
        starts = launchers(spark, directory)
        seconds: dict[str, list[float]] = {name: [] for name in starts}
        for i in range(rounds + 1):
            for name, start in starts.items():
                took = seconds_to_first_step(directory, start)
                if i:  # the first round warms up
                    seconds[name].append(took)
        plain = seconds["plain torchrun"]
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values, plain, strict=True))
            print(f"{name:<40} {statistics.median(values):6.2f} s to the first step, {ratio:.2f} x plain torchrun")
    spark.stop()


if __name__ == "__main__":
    main()
