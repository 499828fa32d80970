"""A program of the user's takes the steps on data that is not in shards: the same end, the same receipts."""

import json
import sys
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig

from sparktrain import cli, plan, receipts
from sparktrain.config import RunConfig
from sparktrain.plan import PlanSpec
from sparktrain.results import RankResult, RunResult
from sparktrain.rundir import RunDir
from sparktrain.tokens.shard import Shard
from sparktrain.train import loop, pipelines
from sparktrain.train.batches import Batches
from sparktrain.train.describe import describe
from sparktrain.train.world import World
from sparktrain.verify import Verify, verify
from tests.conftest import ROOT, TINY_MODEL, tiny_argv

# Keeps what it is given, and gives back the parameters as they are.
SEEN = """
import json, os, shutil, sys
job = json.load(open(sys.argv[1]))
for batch in job["batches"]:
    rank = batch["lease_id"].rsplit("-", 1)[1]
    shutil.copy(batch["payload"]["shard_paths"][0], f"{sys.argv[2]}/{batch['payload']['step']}-{rank}.npz")
shutil.copytree(job["base_parameter_pack_path"], job["output_parameter_pack_path"])
json.dump({"steps_completed": len(job["batches"])}, open(job["result_manifest_path"], "w"))
"""
ROUNDS = ("--strategy.kind", "diloco", "--strategy.sync-every", "3")


@pytest.fixture
def trained(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> Callable[..., tuple[RunResult, list[Any]]]:
    """``trained(name, *flags)``: a run of 6 steps by two ranks: its result, and its receipts without the attempt."""

    def rank_main(rank: int, size: int, config: RunConfig, number: int) -> RankResult:
        loop._say = lambda world, text: None  # type: ignore[assignment]
        directory = RunDir(config.run.dir)
        spec = directory.plan_spec()
        assert spec is not None
        world = World(rank, size, torch.device("cpu"), "host")
        outcome = loop.train_in(world, directory, config, spec, number)
        directory.write_outcome(number, outcome)
        return outcome

    def run(name: str, *flags: str) -> tuple[RunResult, list[Any]]:
        directory = RunDir(tmp_path / name)
        argv = tiny_argv(tmp_path, directory.path, *ROUNDS, "--checkpoint.every", "3", *flags)
        config = cli.parse(RunConfig, argv)
        shard = Shard.from_json(json.loads(json.dumps(describe(config)["dataset"])))
        spec = PlanSpec((shard,), 32, config.train.total_batch, config.train.steps, config.run.seed)
        directory.plan.mkdir(parents=True)
        rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
        pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
        directory.claim(config)
        directory.write_plan_spec(spec)
        number = directory.new_generation()
        result = directory.merge(on_ranks(2, rank_main, config, number))
        assert all(line.startswith("ok") for line in verify(Verify(run_dir=directory.path)))
        files = sorted(directory.generation(number).glob("receipts-*.parquet"))
        given = pa.concat_tables([receipts.read(file) for file in files]).drop_columns("generation").to_pylist()
        return result, sorted(given, key=itemgetter("step", "slot"))

    return run


@pytest.mark.parametrize(
    ("kind", "dataset", "more"),
    [
        ("indexed", "Plain", ()),
        ("indexed", "Masked", ()),
        ("generated", "generate", ()),
        ("micro-epoch", "micro_epoch", ("--data.payload", '{"start": 3}')),
    ],
)
def test_a_program_is_given_what_the_ranks_would_read_and_receipts_say_so(
    trained: Callable[..., tuple[RunResult, list[Any]]], tmp_path: Path, kind: str, dataset: str, more: tuple[str, ...]
) -> None:
    data = ("--data.pipeline", kind, "--data.dataset", f"tests.own_data:{dataset}", *more)
    ours, given = trained("ours", *data)
    (tmp_path / "seen.py").write_text(SEEN)
    command = [sys.executable, str(tmp_path / "seen.py"), "{job_manifest}", str(tmp_path)]
    theirs, given_for_theirs = trained("theirs", *data, "--inner-loop.command", json.dumps(command))
    assert given_for_theirs == given
    assert [(row["step"], row["slot"]) for row in given] == [(step, slot) for step in range(6) for slot in range(8)]
    assert theirs.table["tokens"].to_pylist() == ours.table["tokens"].to_pylist()
    directory = RunDir(tmp_path / "ours")
    spec = directory.plan_spec()
    assert spec is not None
    made = pipelines.planned(directory.config(), 512, spec)
    for step, batch in enumerate(Batches(directory, spec, 0, 1, made=made)):
        parts = [np.load(tmp_path / f"{step}-{rank}.npz") for rank in range(2)]
        assert set(parts[0]) == set(batch.arrays())
        for name, array in batch.arrays().items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), array)


def test_a_program_ends_where_the_ranks_end_on_packed_documents_of_a_dataset(
    trained: Callable[..., tuple[RunResult, list[Any]]], tmp_path: Path
) -> None:
    AutoConfig.for_model("llama", **json.loads(TINY_MODEL)).save_pretrained(tmp_path / "model")
    data = ("--data.pipeline", "indexed", "--data.dataset", "tests.own_data:Packed", "--strategy.sync-every", "6")
    program = (sys.executable, str(ROOT / "examples" / "trainer.py"), "{job_manifest}", "--micro-batch", "4")
    command = [*program, "--model", str(tmp_path / "model")]
    ours, given = trained("ours", *data)
    theirs, given_for_theirs = trained("theirs", *data, "--inner-loop.command", json.dumps(command))
    assert theirs.digest == ours.digest
    assert given_for_theirs == given
