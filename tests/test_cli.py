"""Settings: file first, command line over it. Mistakes are in tests/cases/settings.py."""

from pathlib import Path

import pytest

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError


def write(tmp_path: Path, text: str) -> str:
    file = tmp_path / "c.toml"
    file.write_text(text)
    return str(file)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, "[train]\nsteps = 7\ntotal_batch = 32\n[strategy]\nkind = 'distro'\ncompression_topk = 4\n")
    config = cli.parse(
        RunConfig, [file, "--train.steps", "9", "--optimizer.lr=1e-3", "--strategy.compression-topk", "8"]
    )
    assert (config.train.steps, config.train.total_batch, config.train.micro_batch) == (9, 32, 8)
    assert config.optimizer.lr == 1e-3
    assert config.strategy.model_dump()["compression_topk"] == 8


def test_both_spellings_of_a_flag_are_the_same() -> None:
    for flag in ("--train.total-batch", "--train.total_batch"):
        assert cli.parse(RunConfig, [flag, "16"]).train.total_batch == 16


def test_a_strategy_can_be_switched_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, "[strategy]\nkind = 'adamw'\n")
    assert cli.parse(RunConfig, [file, "--strategy.kind", "distro"]).strategy.kind == "distro"


def test_settings_are_frozen_and_survive_their_file() -> None:
    config = cli.parse(RunConfig, ["--model.sizes", '{"hidden_size": 64}'])
    assert config.model.sizes == {"hidden_size": 64}
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 3  # type: ignore[misc]


def test_every_kind_of_value_can_be_said_on_the_command_line() -> None:
    argv = ["--data.token-size", "4", "--data.path", "a,b", "--data.heldout", "none", "--optimizer.betas", "0.8,0.9"]
    config = cli.parse(RunConfig, [*argv, "--strategy.kind", "sparseloco", "--strategy.quantize-bits", "8"])
    assert (config.data.token_size, config.data.path, config.data.heldout) == (4, ("a", "b"), None)
    assert (config.optimizer.betas, config.strategy.model_dump()["quantize_bits"]) == ((0.8, 0.9), 8)


def test_the_environment_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data", "DATA", "run", "train"):
        monkeypatch.setenv(name, '{"path": "/elsewhere", "steps": 3}')
    assert cli.parse(RunConfig, []) == RunConfig()


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.parse(RunConfig, ["--help"])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    for key in cli._keys(RunConfig):
        assert f"--{key.replace('_', '-')}" in said
    assert "Sequences per forward pass of one rank" in said


def test_places_are_one_or_several_in_a_file_and_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('[data]\npath = ["x", "s3://b/y"]\nheldout = "h"\n')
    data = cli.parse(RunConfig, [str(file)]).data
    assert (data.path, data.heldout) == (("x", "s3://b/y"), ("h",))
    uri = "https://host/x-{00..12}.ds"
    assert cli.parse(RunConfig, [str(file), "--data.path", uri]).data.path == (uri,)
    assert cli.parse(RunConfig, ["--data.path", "a", "--data.path", "b"]).data.path == ("a", "b")
    for empty in ("path = []", "path = [3]"):
        file.write_text(f"[data]\n{empty}\n")
        with pytest.raises(ConfigError, match="data.path"):
            cli.parse(RunConfig, [str(file)])
