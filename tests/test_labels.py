"""Labels, masks and packed documents in training: what is left out does not count, and neighbours are not seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparktrain import cli, plan, tokens
from sparktrain.config import RunConfig
from sparktrain.errors import DataError, ModelError
from sparktrain.plan import PlanSpec
from sparktrain.rundir import RunDir
from sparktrain.tokens.sequences import IGNORED, Window, stack
from sparktrain.train import models
from sparktrain.train.batch import Batch, check_separates
from sparktrain.train.evaluate import heldout_loss, token_losses
from tests.conftest import take_steps, tiny_argv

L = 33
IDS = np.random.default_rng(0).integers(0, 512, (64, L))


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True)
    values = {name: list(rows) for name, rows in {"input_ids": IDS, **columns}.items()}
    pq.write_table(pa.table(values), path, row_group_size=16)
    return path.parent


@pytest.fixture
def trained(on_ranks: Callable[..., list[Any]], tmp_path: Path) -> Callable[..., list[Any]]:
    """``trained(world, directory)``: (records, digest, held-out loss) of each rank after 4 steps of 8 sequences."""

    def rank(rank: int, size: int, directory: RunDir, config: RunConfig, spec: PlanSpec) -> Any:
        records, model, world = take_steps(directory, config, spec, rank, size)
        return records, models.digest(model), heldout_loss(model, config, world)

    def run(world: int, data: Path) -> list[Any]:
        argv = tiny_argv(data, tmp_path / "run", "--data.heldout", str(data))
        argv[argv.index("--data.path") + 1] = str(data)
        shards = tuple(tokens.inspect(path) for path in tokens.find_shards(data))
        spec = PlanSpec(shards, sequence_length=32, total_batch=8, steps=4, seed=5)
        directory = RunDir(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        directory.plan.mkdir(parents=True)
        rows = [row._asdict() for row in plan.rows(spec, 0, spec.num_positions)]
        pq.write_table(pa.Table.from_pylist(rows), directory.plan / "part-0.parquet")
        return on_ranks(world, rank, directory, cli.parse(RunConfig, argv), spec)

    return run


def losses(ranks: list[Any]) -> list[float]:
    steps = zip(*(records for records, *_ in ranks), strict=True)
    return [sum(r.loss_sum for r in records) / sum(r.tokens for r in records) for records in steps]


def half_masked() -> Any:
    """Labels that leave out most of some rows, little of others, and some rows altogether."""
    parts = np.random.default_rng(1).choice([0.0, 0.1, 0.9, 1.0], len(IDS))
    return np.where(np.random.default_rng(2).random(IDS.shape) < parts[:, None], IGNORED, IDS)


def test_labels_that_are_the_tokens_train_what_tokens_train(trained: Callable[..., list[Any]], tmp_path: Path) -> None:
    plain = trained(1, write(tmp_path / "plain" / "a.parquet"))
    labelled = trained(1, write(tmp_path / "labelled" / "a.parquet", labels=IDS))
    assert labelled[0][1:] == plain[0][1:]


def test_any_number_of_ranks_counts_the_same_targets(trained: Callable[..., list[Any]], tmp_path: Path) -> None:
    labels = half_masked()
    data = write(tmp_path / "masked" / "a.parquet", labels=labels)
    alone, together = trained(1, data), trained(3, data)
    counts = [[record.tokens for record in records] for records, *_ in together]
    assert [sum(step) for step in zip(*counts, strict=True)] == [record.tokens for record in alone[0][0]]
    assert counts[0] != counts[1]
    assert losses(together) == pytest.approx(losses(alone), rel=2e-5)
    norms = [[record.grad_norm for record in ranks[0][0]] for ranks in (alone, together)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert together[2][2] == pytest.approx(alone[0][2], rel=1e-4)
    assert len({digest for _, digest, _ in together}) == 1


def test_a_batch_without_a_target_is_one_line(trained: Callable[..., list[Any]], tmp_path: Path) -> None:
    data = write(tmp_path / "empty" / "a.parquet", labels=np.full_like(IDS, IGNORED))
    with pytest.raises(AssertionError, match="DataError: the batch of step 0 has no target"):
        trained(2, data)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packed_documents_have_the_losses_of_documents_alone(attention: str, architecture: str) -> None:
    model = small(architecture, attention)
    lengths = [np.array([10, 3, 20]), np.array([33]), np.array([1, 32])]
    rows = [Window(IDS[i], sequence_lengths=lengths[i]) for i in range(3)]
    batch = Batch.of(stack(rows))
    assert batch.num_targets == 30 + 32 + 31
    parts = [part for i in range(3) for part in np.split(IDS[i], np.cumsum(lengths[i])[:-1]) if len(part) > 1]
    with torch.no_grad():
        alone = sum(float(token_losses(model, Batch(torch.from_numpy(part[None])))) for part in parts)
        assert float(token_losses(model, batch)) == pytest.approx(alone, rel=1e-5)
        assert float(token_losses(model, Batch(batch.tokens, batch.labels))) != pytest.approx(alone, rel=1e-4)
    check_separates(model)


def test_documents_are_told_by_positions_that_start_again(tmp_path: Path) -> None:
    lengths = np.array([10, 3, 20])
    positions = np.concatenate([np.arange(n) for n in lengths])
    told = [stack([Window(IDS[0], **what)]) for what in ({"sequence_lengths": lengths}, {"position_ids": positions})]
    for a, b in ((told[0].targets(), told[1].targets()), (told[0].positions(), told[1].positions())):
        assert a is not None
        assert b is not None
        assert a.tolist() == b.tolist()
    packed = {"position_ids": np.tile(np.arange(L), (64, 1)), "sequence_lengths": [lengths] * 64}
    data = write(tmp_path / "d" / "a.parquet", **packed)
    with pytest.raises(DataError, match="a row 0 whose position_ids and sequence_lengths differ .* at token 10"):
        tokens.TokenFile(tokens.inspect(str(data / "a.parquet"))).window(0, L)


def test_a_model_that_looks_into_the_document_before_is_refused() -> None:
    model = small("mamba", "eager")
    with pytest.raises(ModelError, match="a mamba model cannot keep packed documents apart"):
        check_separates(model)


def small(architecture: str, attention: str) -> Any:
    sizes = {
        "llama": {"intermediate_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
        "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    }[architecture]
    torch.manual_seed(0)
    config = models.AutoConfig.for_model(architecture, vocab_size=512, **sizes)
    options = {} if architecture == "mamba" else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, **options).eval()
    model.config.use_cache = False
    return model
