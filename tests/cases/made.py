"""What is whole before a case damages it: a model, and a run as its driver and its ranks leave it."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sparktrain import cli, plan, tokens
from sparktrain.checkpoints import Manifest, name_of
from sparktrain.config import RunConfig
from sparktrain.plan import PlanSpec
from sparktrain.results import RankResult, RunResult, StepRecord, write_records
from sparktrain.rundir import RunDir
from sparktrain.tokens import tokenizer
from tests.conftest import TINY_MODEL, tiny_argv

NUMBERS = (3e-3, 1.0, 2.0, 0.1, 1.5, 0.4, 10, 10, 10)


def model(path: Path) -> None:
    """A Hugging Face directory with weights and tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**json.loads(TINY_MODEL))).save_pretrained(path)
    tokenizer.train(["def function(value): return value"], 300).save(path)


def run(path: Path, data: Path) -> None:
    """A finished run of two ranks: 6 steps, a checkpoint after every second one."""
    directory, config = RunDir(path), cli.parse(RunConfig, tiny_argv(data, path, "--checkpoint.every", "2"))
    shards = tuple(tokens.inspect(file) for file in tokens.find_shards(data / "train"))
    spec = PlanSpec(shards, sequence_length=32, total_batch=8, steps=6, seed=5)
    with directory.lock():
        directory.claim(config)
        directory.plan.mkdir()
        rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
        pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
        directory.write_plan_spec(spec)
        directory.new_generation()
        records = [StepRecord(step, 100.0 - step, 128, *NUMBERS) for step in range(6)]
        last = None
        for step in (2, 4, 6):
            name = name_of(step, 1)
            for rank in range(2):
                content = write_records(rank, records[step - 2 : step])
                parts = directory.checkpoints.write_part(directory.records(1, rank, step), content, None)
                part = directory.checkpoints.directory(name) / f"rank-{rank:05d}.safetensors"
                parts |= directory.checkpoints.write_part(part, b"state %d" % step, None)
                directory.checkpoints.seal(name, rank, parts)
            last = directory.checkpoints.commit(Manifest(name, step, 1, last and last.name, 2, {}, {}), 1.0)
        (path / "model").mkdir()
        (path / "model" / "config.json").write_text("{}")
        ranks = [RankResult(rank, 2, "host", records, "d", 1000, None, None, 0.0) for rank in range(2)]
        for outcome in ranks:
            directory.write_outcome(1, outcome)
        directory.write_result(RunResult.merge(str(path), ranks))
