"""Models: rank 0's weights on every rank, and a description that matches the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError
from sparktrain.train import describe, models
from sparktrain.train.evaluate import heldout_loss
from sparktrain.train.world import World
from tests.conftest import tiny_argv


def world_of(rank: int, size: int) -> World:
    return World(rank, size, torch.device("cpu"), "host")


def test_all_ranks_start_with_rank_0s_weights(on_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path) -> None:
    def digest(rank: int, size: int, seed: int) -> tuple[str, float]:
        # Another seed on each rank: only the broadcast can make them equal.
        argv = tiny_argv(
            data, tmp_path / "run", "--run.seed", str(seed + rank), "--data.heldout", str(data / "heldout")
        )
        config = cli.parse(RunConfig, argv)
        model = models.build(config, world_of(rank, size))
        loss = heldout_loss(model, config, world_of(rank, size))
        assert loss is not None
        return models.digest(model), loss

    (alone,) = on_ranks(1, digest, 7)
    three = on_ranks(3, digest, 7)
    assert [d for d, _ in three] == [alone[0]] * 3
    assert [loss for _, loss in three] == pytest.approx([alone[1]] * 3, rel=1e-6)
    assert on_ranks(1, digest, 8)[0][0] != alone[0]


def test_a_local_model_directory_is_where_training_starts(
    on_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path
) -> None:
    config = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run"))

    def save(rank: int, size: int) -> str:
        model = models.build(config, world_of(rank, size))
        models.save(model, config, tmp_path / "model")
        return models.digest(model)

    def load(rank: int, size: int) -> str:
        start = cli.parse(
            RunConfig, tiny_argv(data, tmp_path / "r", "--model.from-pretrained", str(tmp_path / "model"))
        )
        return models.digest(models.build(start, world_of(rank, size)))

    saved = on_ranks(1, save)
    assert on_ranks(2, load) == saved * 2
    assert sorted(p.name for p in (tmp_path / "model").glob("*.safetensors")) == ["model.safetensors"]


def test_the_description_counts_what_training_would_hold(data: Path, tmp_path: Path) -> None:
    config = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run"))
    told = describe.describe(config)
    model = models.AutoModelForCausalLM.from_config(models.model_config(config))
    assert told["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert (told["vocab_size"], told["max_positions"]) == (512, 128)
    assert told["traffic"]["adamw"]["payload_bytes"] == 4 * told["num_parameters"]
    assert told["traffic"]["distro"]["payload_bytes"] < told["traffic"]["adamw"]["payload_bytes"] / 10


def test_a_sequence_longer_than_the_models_positions_is_refused(data: Path, tmp_path: Path) -> None:
    config = cli.parse(RunConfig, tiny_argv(data, tmp_path / "run", "--data.sequence-length", "129"))
    with pytest.raises(ConfigError, match="data.sequence_length is 129, more than the model's 128 positions"):
        models.model_config(config)


def test_a_model_that_sees_what_it_is_to_predict_is_refused(
    on_ranks: Callable[..., list[Any]], data: Path, tmp_path: Path
) -> None:
    def build(rank: int, size: int) -> str:
        sizes = '{"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}'
        argv = [sizes if "num_key_value_heads" in word else word for word in tiny_argv(data, tmp_path / "run")]
        with pytest.raises(ConfigError) as caught:
            models.build(cli.parse(RunConfig, [*argv, "--model.architecture", "bert"]), world_of(rank, size))
        return str(caught.value)

    assert on_ranks(1, build)[0].startswith("model bert looks at the tokens it is to predict")


def test_sizes_that_are_not_those_of_the_model_to_start_from_are_refused(data: Path, tmp_path: Path) -> None:
    models.model_config(cli.parse(RunConfig, tiny_argv(data, tmp_path))).save_pretrained(tmp_path / "model")
    argv = tiny_argv(data, tmp_path / "run", "--model.from-pretrained", str(tmp_path / "model"))
    assert models.model_config(cli.parse(RunConfig, argv)).num_hidden_layers == 2
    with pytest.raises(ConfigError, match=r"model\.sizes\.num_hidden_layers is 3, but .* has 2: remove it"):
        models.model_config(cli.parse(RunConfig, [*argv, "--model.sizes", '{"num_hidden_layers": 3}']))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ('{"vocab_size": 512, "hidden_size": -32, "num_attention_heads": 2}', "model.sizes"),
        ('{"vocab_size": 512, "hidden_size": 64, "num_attention_heads": 0}', "model.sizes"),
        ('{"vocab_size": 512, "hidden_size": "wide"}', "model.sizes do not make a llama: .*hidden_size"),
    ],
)
def test_sizes_that_make_no_model_are_one_line(data: Path, tmp_path: Path, sizes: str, message: str) -> None:
    argv = [sizes if "num_key_value_heads" in word else word for word in tiny_argv(data, tmp_path / "run")]
    with pytest.raises(ConfigError, match=message) as caught:
        describe.describe(cli.parse(RunConfig, argv))
    assert "\n" not in str(caught.value)
