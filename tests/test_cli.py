"""Settings: file first, command line over it, and one line for each mistake."""

from pathlib import Path

import pytest

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError

DILOCO = ("--strategy.kind", "diloco", "--strategy.sync-every", "50")


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


@pytest.mark.parametrize(
    ("toml", "argv", "message"),
    [
        ("[train]\nstep = 3\n", [], "c.toml: unknown key train.step: did you mean train.steps?"),
        ("[trane]\nsteps = 3\n", [], "c.toml: unknown key trane"),
        ("[train]\nsteps = 'many'\n", [], "c.toml: train.steps: input should be a valid integer, found 'many'"),
        ("[optimizer]\nlr = '3e-4'\n", [], "c.toml: optimizer.lr: input should be a valid number, found '3e-4'"),
        ("[train]\nsteps = 0\n", [], "train.steps: input should be greater than or equal to 1, found 0"),
        ("[optimizer]\nlr = nan\n", [], "optimizer.lr"),
        ("[train\nsteps = 3\n", [], "c.toml is not valid TOML: .* line 1"),
        ("[train]\nsteps = 1\nsteps = 2\n", [], "c.toml is not valid TOML: .*line 3"),
        ("[strategy]\nkind = 'adam'\n", [], "c.toml: strategy: .*'adamw', 'distro'"),
        ("[strategy]\nkind = 'distro'\ncompression_topq = 3\n", [], "unknown key strategy.compression_topq: did you"),
        ("[train]\ntotal_batch = 10\nmicro_batch = 4\n", [], "set train.total_batch to 8 or 12"),
        ("[train]\ntotal_batch = 4\nmicro_batch = 8\n", [], "train.micro_batch is 8, more than train.total_batch 4"),
        ("", ["--run.dir", "s3://b/x"], "run.dir is 's3://b/x': expected a directory that driver and executors share"),
        ("", ["--train.max-grad-norm", "inf"], "train.max_grad_norm: input should be a finite number"),
        ("", ["--strategy.kind", "distro", "--strategy.overlap", "true"], "a switch takes no value"),
        ("a = " + "[" * 5000, [], "nested too deeply|is not valid TOML"),
        (
            "[train]\nbatch_ramp = [[3, 8], [3, 9]]\n",
            [],
            "batch_ramp has .3, 9. after step 3: expected ascending steps",
        ),
        ("[launch]\nweights = [1, 0]\n", [], "launch.weights are .1.0, 0.0.: expected numbers above 0"),
        ("[data]\nskip = [{sequences = [0, 3]}]\n", [], "an entry of data.skip names a shard"),
        ("[data]\nskip = [{steps = [3, 3]}]\n", [], "data.skip has steps .3, 3.: expected .first, last"),
        ("[data]\norder = 'psyche'\nblock = 8\n", [], "data.block is 8, but only data.order shuffle moves blocks"),
        ("", ["--train.stepz", "3"], "unknown option --train.stepz: did you mean --train.steps?"),
        ("", ["--train.steps", "1.5"], "train.steps: input should be a valid integer.*found '1.5'"),
        ("", ["--train.steps"], "command line: .*steps"),
        ("", ["--strategy.kind", "distro", "--strategy.compression-topk", "5000"], "set it to at most 4096"),
        (
            "",
            ["--strategy.kind", "diloco", "--strategy.sync-every", "0"],
            "strategy.sync_every is '0': expected a number",
        ),
        (
            "[strategy]\nkind = 'diloco'\nsync_every = 'often'\n",
            [],
            "strategy.sync_every is 'often': expected a number",
        ),
        (
            "",
            [*DILOCO, "--strategy.num-fragments", "3"],
            "num_fragments is 3, which does not divide .* 50: set .* to 51",
        ),
        ("", [*DILOCO, "--strategy.fragment-sync-delay", "50"], "fragment_sync_delay is 50, .*: set it to at most 49"),
        (
            "",
            [*DILOCO, "--strategy.compression", "int3"],
            "strategy.compression: input should be 'none', 'bf16', 'int8'",
        ),
        ("", [*DILOCO, "--strategy.outer-momentum", "0"], "nesterov is on but strategy.outer_momentum is 0: set"),
        ("", ["--strategy.kind", "sparseloco", "--strategy.quantize-bits", "4"], "strategy.quantize_bits: .* 2 or 8"),
        ("", ["--strategy.kind", "sparseloco", "--strategy.compression-topk", "5000"], "set it to at most 4096"),
        ("", ["--optimizer.betas", "[0.9,1.5]"], "optimizer.betas are .*expected two numbers in"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, toml: str, argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cli.parse(RunConfig, [write(tmp_path, toml), *argv])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"config file nowhere\.toml does not exist"):
        cli.parse(RunConfig, ["nowhere.toml"])


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
