"""Fixtures of the three rings: pure tests need none, ``on_ranks`` gives real gloo ranks, ``spark`` a real Spark."""

import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparktrain import cli
from sparktrain.tokens import ds

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 512
TINY_MODEL = (
    '{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, '
    '"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}'
)

_DEADLINE_SECONDS = 300


def _rank(fn: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, store: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
        value: Any = fn(rank, world, *args)
        dist.barrier()
        dist.destroy_process_group()
        outcome = (True, value)
    except BaseException:
        outcome = (False, traceback.format_exc())
    # By plain pickle: the pipe's own pickler would hand tensors over as shared memory that dies with this process.
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    os._exit(0)


def run_on_ranks(world: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """``[fn(rank, world, *args) for each rank]``, run in as many real processes joined by gloo.

    Ranks are forked, so ``fn`` may be a closure; what it returns must pickle. One thread each: forking a process
    whose OpenMP threads have started hangs.
    """
    import torch

    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        pipes, processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(fn, args, rank, world, store, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        try:
            outcomes = [
                pickle.loads(pipe.recv_bytes()) if pipe.poll(_DEADLINE_SECONDS) else (False, "deadline passed")
                for pipe in pipes
            ]
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]


@pytest.fixture
def on_ranks() -> Callable[..., list[Any]]:
    """See :func:`run_on_ranks`."""
    return run_on_ranks


def take_steps(directory: Any, config: Any, spec: Any, rank: int, size: int) -> tuple[list[Any], Any, Any]:
    """All steps of ``spec`` as one rank of a process group that is there: (records, model, world), synced."""
    import torch

    from sparktrain.train import loop, models
    from sparktrain.train.live import Live
    from sparktrain.train.nonfinite import NonFinite
    from sparktrain.train.requests import Requests
    from sparktrain.train.strategies import STRATEGIES
    from sparktrain.train.world import World

    world = World(rank, size, torch.device("cpu"), "host")
    model = models.build(config, world)
    build = STRATEGIES[config.strategy.kind].build
    strategy = build(dict(model.named_parameters()), config.strategy, config.optimizer, spec.steps)
    live = Live(directory.path, config, world, 0)
    nonfinite = NonFinite(directory, world, live, strategy.local, strategy.refuses, lambda: 0)
    requests = Requests(directory, world, strategy.local, live.waits, nonfinite.skips_loss)
    records = list(
        loop._steps(loop.Training(directory, config, spec, world, model, strategy, live, requests, nonfinite))
    )
    strategy.sync()
    return records, model, world


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """A ``local[2]`` session shared by all tests of a process."""
    from pyspark.sql import SparkSession

    os.environ["PYSPARK_PYTHON"] = sys.executable
    session = (
        SparkSession.builder.master("local[2]")
        .appName("sparktrain tests")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", "2")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")
    yield session
    session.stop()


def write_shards(directory: Path, shards: int = 3, tokens: int = 4000, seed: int = 0) -> Path:
    """``shards`` shards of a random walk over the vocabulary: learnable in a few steps."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(shards):
        document = np.cumsum(rng.integers(0, 3, tokens)) % VOCAB
        ds.write(directory / f"{i:05d}_00000_shuffled.ds", [document], VOCAB, "random walk")
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``train`` and ``heldout`` shards. Tests that damage shards write their own."""
    directory = tmp_path_factory.mktemp("data")
    write_shards(directory / "train")
    write_shards(directory / "heldout", shards=1, seed=1)
    return directory


def tiny_argv(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Arguments of jobs/train.py for a run of a few seconds."""
    return [
        *("--run.dir", str(run_dir), "--run.seed", "5", "--run.log-every", "2"),
        *("--data.path", str(data / "train"), "--data.sequence-length", "32"),
        *("--model.sizes", TINY_MODEL, "--optimizer.lr", "3e-3", "--schedule.warmup-steps", "2"),
        *("--train.steps", "6", "--train.total-batch", "8", "--train.micro-batch", "4", "--launch.ranks", "2"),
        *more,
    ]


@pytest.fixture
def job(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``job("train", *argv) -> (exit code, stdout, stderr)``: a job's own main, in this process and Spark session."""

    def run(name: str, *argv: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main(runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))["main"], list(argv))
        out, err = capfd.readouterr()
        return int(exit_.value.code or 0), out, err

    return run
