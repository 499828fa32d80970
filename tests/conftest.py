"""Fixtures of the three rings: pure tests need none, ``on_ranks`` gives real gloo ranks, ``spark`` a real Spark."""

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

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
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
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
            outcomes = [pipe.recv() if pipe.poll(_DEADLINE_SECONDS) else (False, "deadline passed") for pipe in pipes]
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


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """A ``local[2]`` session shared by all tests of a process."""
    from pyspark.sql import SparkSession

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
