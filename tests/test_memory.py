"""A rank that gets no memory says which setting to lower, and is not started again."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparktrain import cli, plan, tokens, worker
from sparktrain.config import RunConfig
from sparktrain.plan import PlanSpec
from sparktrain.rundir import RunDir
from sparktrain.spark import launch
from tests.conftest import tiny_argv

_ROOM = 640 << 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to see what is in use")
def test_a_rank_without_memory_names_the_setting_to_lower(
    on_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path
) -> None:
    shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=16384, steps=1, seed=5)
    directory = RunDir(tmp_path / "run")
    directory.plan.mkdir(parents=True)
    rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
    pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
    # Logits of 16,384 sequences of 32 tokens, 512 words, float32: 1 GB.
    argv = [*tiny_argv(data, directory.path), "--train.total-batch", "16384", "--train.micro-batch", "16384"]
    config, number = cli.parse(RunConfig, argv), directory.new_generation()

    def rank_main(rank: int, size: int) -> None:
        import torch

        from sparktrain.train import loop
        from sparktrain.train.world import World

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, resource.RLIM_INFINITY))
        try:
            loop.train_in(World(rank, size, torch.device("cpu"), "here"), directory, config, spec, number)
        except Exception as error:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            directory.write_outcome(number, worker._failure(rank, error))

    on_ranks(1, rank_main)
    found = launch.explain(directory, number, RuntimeError("a task failed"))
    assert str(found).startswith("rank 0 on ")
    assert str(found).endswith(": lower train.micro_batch, or set model.gradient_checkpointing")
    assert not found.transient
