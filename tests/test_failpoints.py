"""A rank that is killed, anywhere, or a disk that is full: the next start ends as if nothing had happened."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sparktrain import atomic, cli, failpoints, plan, storage, tokens
from sparktrain.config import RunConfig
from sparktrain.plan import PlanSpec
from sparktrain.rundir import RunDir
from tests.conftest import tiny_argv


def _rank(config: RunConfig, spec: PlanSpec, number: int, rank: int, world: int, store: str, armed: str) -> None:
    import torch
    import torch.distributed as dist

    from sparktrain.train import loop
    from sparktrain.train.world import World

    torch.set_num_threads(1)
    failpoints.arm(armed)
    loop._say = lambda world, text: None  # type: ignore[assignment]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            joined = {"store": dist.FileStore(store, world), "rank": rank, "world_size": world}
            dist.init_process_group("gloo", timeout=timedelta(seconds=30), **joined)
            directory = RunDir(str(config.run.dir))  # an object store's connections are not for forked processes
            outcome = loop.train_in(World(rank, world, torch.device("cpu"), "here"), directory, config, spec, number)
            directory.write_outcome(number, outcome)
            dist.barrier()
        except Exception:
            os._exit(1)
    os._exit(0)


def attempt_at(place: Path, data: Path, spec: PlanSpec, stores: Path, armed: str) -> list[int]:
    """Two ranks, which meet by a file in ``stores``, train by ``spec`` at ``place``, a checkpoint every 2 steps; their
    exit statuses."""
    directory = RunDir(place)
    if not storage.entries(directory.plan):
        directory.plan.mkdir(parents=True)
        rows = pa.Table.from_pylist([row._asdict() for row in plan.rows(spec, 0, spec.num_positions)])
        atomic.write_table(directory.plan / "part-0.parquet", rows)
    argv = tiny_argv(data, place, "--checkpoint.every", "2", "--launch.collective-timeout", "20")
    config, number = cli.parse(RunConfig, argv), directory.new_generation()
    context, store = multiprocessing.get_context("fork"), str(stores / f"store-{place.parent.name}-{number}")
    ranks: list[Any] = [
        context.Process(target=_rank, args=(config, spec, number, rank, 2, store, armed)) for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    while any(rank.exitcode is None for rank in ranks):
        time.sleep(0.02)
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.kill()  # as torchrun does with what is left
    return [rank.exitcode for rank in ranks]


@pytest.fixture
def attempt(data: Path) -> Callable[..., list[int]]:
    """``attempt(directory, armed)``: two ranks train 6 steps, a checkpoint every 2; their exit statuses."""
    import torch

    torch.set_num_threads(1)  # a forked process hangs where OpenMP's threads have started
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=8, steps=6, seed=5)
    return lambda path, armed="": attempt_at(path, data, spec, path, armed)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Any]:
    return {}


KILLS = [
    "start@rank=1:kill",
    "loaded@rank=0:kill",
    "batch@rank=1,step=3:kill",
    "gradient@rank=0,step=3:kill",
    "updated@rank=1,step=3:kill",
    "checkpoint.copied@rank=0,step=4:kill",
    "checkpoint.copied@rank=1,step=2:kill",
    "checkpoint.weights@rank=0,step=4:kill",
    "checkpoint.parts@rank=0,step=4:kill",
    "checkpoint.parts@rank=1,step=4:kill",
    "checkpoint.manifest@step=4:kill",
    "checkpoint.committed@step=6:kill",
    "trained@rank=1:kill",
    "saved@rank=0:kill",
    "checkpoint.weights@rank=0,step=4:full",
    "checkpoint.parts@rank=1,step=4:full",
    "gradient@rank=1,step=5:raise",
]


@pytest.mark.parametrize("armed", KILLS)
def test_whatever_ends_a_rank_the_next_start_ends_as_if_it_had_not(
    attempt: Callable[..., list[int]], undisturbed: dict[str, Any], tmp_path: Path, armed: str
) -> None:
    if not undisturbed:
        assert attempt(tmp_path / "whole") == [0, 0]
        whole = RunDir(tmp_path / "whole")
        undisturbed["result"] = whole.merge(whole.outcomes(1))  # type: ignore[arg-type]
    path = tmp_path / "broken"
    assert any(status != 0 for status in attempt(path, armed))
    assert attempt(path) == [0, 0]
    directory = RunDir(path)
    result = directory.merge(directory.outcomes(2))  # type: ignore[arg-type]
    assert result.digest == undisturbed["result"].digest
    assert result.table["loss"].to_pylist() == undisturbed["result"].table["loss"].to_pylist()
    newest, damages = directory.checkpoints.newest()
    assert newest is not None
    assert (newest.step, damages) == (6, [])
    left = [p for p in path.rglob("*") if p.name.endswith(".tmp") or p.name.startswith((".removed", ".rank"))]
    assert not left


@pytest.mark.parametrize("text", ["nowhere:kill", "start:explode", "start@rank=x:kill", "start:exit", "start"])
def test_a_failpoint_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is none: expected"):
        failpoints.arm(text)
    failpoints.arm("")
