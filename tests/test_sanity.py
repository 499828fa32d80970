"""The preflight table: what a machine is found to be, a row per rank, and what keeps a run from its start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparktrain import cli
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, LaunchError, SparktrainError
from sparktrain.spark import preflight
from sparktrain.spark.sanity import problem_of, rows_of, table
from sparktrain.train import sanity
from sparktrain.train.describe import describe
from sparktrain.train.strategies import STRATEGIES, StrategyKind
from sparktrain.train.world import World
from tests.conftest import TINY_MODEL


def config_of(*flags: str) -> RunConfig:
    start = ("--data.path", "x", "--data.sequence-length", "32", "--model.sizes", TINY_MODEL, "--launch.ranks", "3")
    return cli.parse(RunConfig, [*start, *flags])


def report(node: int, host: str, **changes: Any) -> dict[str, Any]:
    found = {"layout": "torch-layout-aaaaaaaaaaaaaaaa", "tensors": None, "device": "cpu", "needs": 10**9, "has": 10**10}
    return {"node": node, "host": host, "model": {"sanity": found | changes}}


@pytest.mark.parametrize(
    ("flags", "least", "most"),
    [
        (("adamw",), 16, 16),  # a parameter, its gradient, two moments
        (("diloco",), 20, 20),  # and the shared parameter: few rounds are averaged
        (("diloco", "--strategy.sync-every", "2"), 24, 24),  # and the outer momentum
        (("diloco", "--strategy.sync-every", "6", "--strategy.num-fragments", "3", "--strategy.outer", "sgd"), 24, 24),
        (("sparseloco",), 24, 24),
        (("distro",), 12, 17),
        (("distro", "--strategy.overlap"), 12, 17),
        (("diloco", "--model.dtype", "bfloat16"), 12, 12),
    ],
)
def test_a_machine_is_asked_by_trying_and_says_what_a_rank_holds(flags: tuple[str, ...], least: int, most: int) -> None:
    found = describe(config_of("--strategy.kind", *flags))
    assert least <= found["sanity"]["needs"] / found["num_parameters"] <= most + 0.1
    assert found["sanity"]["has"] > 10**8
    assert found["sanity"]["layout"].startswith("torch-layout-")


def test_a_program_and_what_it_trains_are_looked_for() -> None:
    rounds = ("--strategy.kind", "diloco", "--strategy.sync-every", "2", "--inner-loop.command")
    found = describe(config_of(*rounds, '["python", "x.py"]', "--inner-loop.exclude-globs", "lm_head*"))
    assert found["sanity"]["tensors"] == 20
    with pytest.raises(ConfigError, match="program 'no-such-trainer' was not found: give its path"):
        describe(config_of(*rounds, '["no-such-trainer"]'))
    with pytest.raises(ConfigError, match="selected zero floating-point parameters of 21"):
        describe(config_of(*rounds, '["python"]', "--inner-loop.include-globs", "encoder.*"))


def test_a_strategy_that_does_not_run_there_is_named_with_its_reason() -> None:
    def build(*arguments: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    with pytest.raises(LaunchError, match="strategy adamw does not run on here: no kernel image is available$"):
        sanity.look(
            config_of(),
            torch.nn.Linear(2, 2),
            StrategyKind(build, STRATEGIES["adamw"].traffic_per_step),
            World(0, 1, torch.device("cpu"), "here"),
        )


def test_a_row_per_rank_and_one_verdict() -> None:
    config = config_of("--strategy.kind", "diloco", "--strategy.sync-every", "300")
    rows = rows_of([report(0, "a"), {"node": 1, "host": "a"}, report(2, "b", needs=2 * 10**9)], config)
    assert [(row["rank"], row["host"]) for row in rows] == [(0, "a"), (1, "a"), (2, "b")]
    first, _, third, verdict = table(rows, config, {"payload_bytes": 1234})
    assert first == "rank 0     a, cpu: layout aaaaaaaaaaaa; 1.0 GB of 10.0 GB and activations; 1,234 bytes per step"
    assert "2.0 GB of 10.0 GB" in third
    assert verdict.startswith("verdict    ready: layouts agree; diloco took a round on each kind of host; 1,000 steps")
    assert "rounds of 300: 3 and 100 steps" in verdict
    assert len(rows_of([report(0, "a")], config)) == 3  # in local mode one task looks for all


@pytest.mark.parametrize(
    ("reports", "flags", "message"),
    [
        ([report(0, "a"), report(1, "b", layout="torch-layout-b")], (), "executor b makes another model .* executor a"),
        (
            [report(0, "a", needs=4 * 10**9)],
            (),
            r"3 rank\(s\) on a hold 12.0 GB of .*its cpu has 10.0 GB: train a smal",
        ),
        ([report(0, "a", needs=11 * 10**9, device="cuda:0")], (), r"1 rank\(s\) on a hold 11.0 GB"),
        (
            [report(0, "a")],
            ("--strategy.kind", "diloco", "--strategy.sync-every", "1001"),
            "sync_every is 1001, but train.steps is 1000: no round would end; set strategy.sync_every to at most 1000",
        ),
    ],
)
def test_what_cannot_go_well_is_one_line(reports: list[Any], flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(SparktrainError, match=message):
        rows_of(reports, config_of(*flags))


def test_the_problem_of_any_host_is_raised_as_it_was_there() -> None:
    assert problem_of(report(0, "a")) is None
    assert isinstance(problem_of({"problem": "x", "code": 2}), ConfigError)
    assert isinstance(problem_of({"problem": "x", "code": 7}), LaunchError)


def test_files_of_a_command_are_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").touch()
    (tmp_path / "python").touch()
    rounds = ("--strategy.kind", "diloco", "--strategy.sync-every", "2", "--inner-loop.command")
    command = json.dumps(["python", "my.py", "{job_manifest}", "--flag"])
    found = preflight._program(config_of(*rounds, command, "--inner-loop.module-search-roots", "lib").inner_loop)
    assert found["command"] == ["python", str(tmp_path / "my.py"), "{job_manifest}", "--flag"]
    assert found["module_search_roots"] == [str(tmp_path / "lib")]
