"""A user's mistake is one line that says what to do, an exit code, and nothing left behind."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparktrain.tokens import ds
from tests.conftest import tiny_argv, write_shards

Job = Callable[..., tuple[int, str, str]]


def damaged(tmp_path: Path, kind: str) -> Path:
    """A data directory with one thing wrong."""
    train = tmp_path / "data" / "train"
    if kind == "empty":
        train.mkdir(parents=True)
    elif kind == "odd":
        write_shards(train)
        with open(train / "00001_00000_shuffled.ds", "ab") as file:
            file.write(b"x")
    elif kind == "short":
        write_shards(train)
        ds.write(train / "00003_00000_shuffled.ds", [np.arange(20)], 512, "random walk")
    elif kind == "pointer":
        write_shards(train)
        (train / "00003.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    elif kind == "vocabulary":
        write_shards(train)
        ids = np.arange(4000) % 512
        ids[1234] = 700
        ds.write(train / "00002_00000_shuffled.ds", [ids], 512, "random walk")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("missing", 3, "data directory .*train does not exist: give a directory with"),
        ("empty", 3, "holds no .* shards: make some with jobs/tokenize.py"),
        ("odd", 3, "00001_00000_shuffled.ds has 8001 bytes, not a multiple of its token size 2"),
        ("short", 3, "00003_00000_shuffled.ds has 20 tokens, fewer than one sequence of 32 [+] 1: set data.sequence"),
        ("pointer", 3, "00003.bin is a git-lfs pointer, not the file itself: run git lfs pull"),
        ("vocabulary", 3, "00002_00000_shuffled.ds has token id 700 at token 1234, but the model's vocab_size is 512"),
    ],
)
def test_data_that_cannot_be_trained_on(
    spark: Any, job: Job, tmp_path: Path, kind: str, code: int, message: str
) -> None:
    check(job(*("train", *tiny_argv(damaged(tmp_path, kind), tmp_path / "run"))), code, message, tmp_path)


def test_a_config_file_that_is_not_there(job: Job, tmp_path: Path) -> None:
    check(job("train", "nowhere.toml"), 2, "config file nowhere.toml does not exist", tmp_path)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--data.sequence-length", "500"], 2, "data.sequence_length is 500, more than the model's 128 positions"),
        (["--launch.weights", "[1,2,3]"], 2, "launch.weights are 3 numbers for 2 ranks: give one for each rank"),
        (["--data.skip", '[{"shard": "nowhere.ds"}]'], 3, "data.skip names shard nowhere.ds, of which data.path has 0"),
        (["--launch.ranks", "9"], 2, "launch.ranks is 9, more than train.total_batch 8: set launch.ranks to at most 8"),
        (
            ["--launch.mode", "executors", "--launch.ranks", "3"],
            2,
            "launch.ranks is 3, but the cluster has 2 slots for barrier tasks: set launch.ranks to at most 2",
        ),
        (["--data.token-size", "3"], 2, "data.token_size"),
        (["--data.sources", '{"name": "a", "path": "x"}'], 2, "data.path and data.sources are both given: leave one"),
        (["--data.window", "none"], 2, "data.window.*overlap1.*psyche"),
        (["--launch.launcher", "direct"], 2, "launch.launcher is direct, .* set launch.launcher to torchrun"),
        (["--model.architecture", "lama"], 2, "model.architecture 'lama' is unknown to transformers"),
        (["--model.sizes", '{"hiden_size": 3}'], 2, "model.sizes.hiden_size is not a size of llama"),
        (["--model.sizes", '{"hidden_size": 65, "num_attention_heads": 2}'], 2, "model.sizes do not make a llama"),
    ],
)
def test_settings_that_do_not_fit(
    spark: Any, job: Job, data: Path, tmp_path: Path, argv: list[str], code: int, message: str
) -> None:
    check(job("train", *tiny_argv(data, tmp_path / "run"), *argv), code, message, tmp_path)


def test_a_model_directory_without_config(spark: Any, job: Job, data: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    argv = tiny_argv(data, tmp_path / "run", "--model.from-pretrained", str(tmp_path / "model"))
    check(job("train", *argv), 4, "model directory .*model has no config.json: give a Hugging Face model dir", tmp_path)


def test_a_run_directory_of_somebody_else(spark: Any, job: Job, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "LOCK").write_text(json.dumps({"host": "node7", "pid": 12, "since": "2026-01-01T00:00:00+00:00"}))
    code, _, err = job("train", *tiny_argv(data, run))
    assert (code, err.count("\n")) == (5, 1)
    assert "is in use by process 12 on node7 since 2026-01-01" in err
    shutil.rmtree(run)
    run.mkdir()
    (run / "novel.txt").write_text("x")
    code, _, err = job("train", *tiny_argv(data, run))
    assert (code, os.listdir(run)) == (2, ["novel.txt"])
    assert "is not empty and holds no sparktrain run: choose another run.dir" in err


def check(outcome: tuple[int, str, str], code: int, message: str, tmp_path: Path) -> None:
    found, _, err = outcome
    lines = [line for line in err.splitlines() if "WARN" not in line and "Stage" not in line]
    assert found == code, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not (tmp_path / "run").exists()
