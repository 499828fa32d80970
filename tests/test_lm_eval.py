"""EleutherAI's harness opens a run's model as it is, and finds the loss that the model has.

``SPARKTRAIN_LM_EVAL``, or the PATH, has its ``lm_eval``, which wants forty packages more: ``make lm-eval`` installs it
beside ours and runs this. Without one it is skipped.
"""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.spark import driver
from sparktrain.spark.tokenize import TokenizeConfig, tokenize
from tests.conftest import ROOT, tiny_argv

LM_EVAL = os.environ.get("SPARKTRAIN_LM_EVAL") or shutil.which("lm_eval")
PARAGRAPHS = ["A rank is a process.", "Ranks meet, and go on.\nEach has a share of every batch.", "The end."]


@pytest.mark.skipif(LM_EVAL is None, reason="no lm_eval: set SPARKTRAIN_LM_EVAL")
def test_the_harness_opens_a_runs_model_and_finds_its_loss(spark: Any, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for i, page in enumerate(sorted((ROOT / "docs").glob("*.md"))):
        shutil.copy(page, tmp_path / "texts" / f"{i}.txt")
    made = TokenizeConfig(input=tmp_path / "texts", glob="*.txt", output=tmp_path / "data", vocab_size=400)
    tokenize(spark, made)
    sizes = '{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}'
    argv = [*tiny_argv(tmp_path / "data", tmp_path / "run"), "--model.sizes", sizes]
    driver.run(spark, cli.parse(RunConfig, argv))

    (tmp_path / "README.md").write_text("\n\n".join(PARAGRAPHS))
    command = [
        *(str(LM_EVAL), "--model", "hf", "--model_args", "pretrained=run/model", "--tasks", "prose"),
        *("--include_path", str(ROOT / "examples" / "lm_eval"), "--device", "cpu", "--output_path", "out"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["prose"]["bits_per_byte,none"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    bits = 0.0
    for text in PARAGRAPHS:
        ids = [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        bits += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")) / math.log(2)
    assert found == pytest.approx(bits / sum(len(text.encode()) for text in PARAGRAPHS), rel=1e-4)
