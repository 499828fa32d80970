"""External trainers: the files burn_p2p's have, the same parameters as in process, and one line for each failure."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sparktrain import heartbeat
from sparktrain.errors import ConfigError, LaunchError, ModelError, SparktrainError
from sparktrain.train.external import (
    Command,
    InnerRound,
    StateBlob,
    cached_microshard_group,
    micro_epoch,
    run_inner,
)
from sparktrain.train.parameter_pack import StateDictFilter
from tests import external_trainer
from tests.conftest import ROOT

TRAINER = (sys.executable, str(ROOT / "tests" / "external_trainer.py"), "{job_manifest}")
BASE = {"w": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(3)}


def batches(*seeds: int) -> list[dict[str, Any]]:
    return [micro_epoch("lease", ["a"], [0], 0, "generated-dataset", {"seed": seed}) for seed in seeds]


def round_of(steps: int = 3, number: int = 0, **more: Any) -> InnerRound:
    return InnerRound("run", 1, number, steps, **({"batches": batches(1), "model_schema_hash": "schema"} | more))


def script(code: str) -> tuple[str, ...]:
    """A command that runs ``code`` with the job in ``job``; ``finish(**result)`` hands the base back as the result."""
    head = """
import json, os, shutil, sys, time
job = json.load(open(sys.argv[1]))
def finish(**result):
    shutil.copytree(job['base_parameter_pack_path'], job['output_parameter_pack_path'])
    json.dump({'steps_completed': job['num_inner_steps']} | result, open(job['result_manifest_path'], 'w'))
"""
    return (sys.executable, "-I", "-S", "-c", head + code, "{job_manifest}")


def inner(code: str, tmp_path: Path, steps: int = 3, **options: Any) -> Any:
    return run_inner(BASE, Command(script(code), **options), round_of(steps), tmp_path / "work")


# -- what it is for -------------------------------------------------------------------------------------------------


def test_command_and_process_end_with_the_same_parameters(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    here = external_trainer.network()
    here[3].bias.requires_grad_(False)  # excluded from the pack, so it stays as everybody's first draw has it
    optimizer = external_trainer.optimizer_of(here)
    state = {key: value.clone() for key, value in here.state_dict().items()}
    command = Command(TRAINER, state_dict_filter=StateDictFilter((), ("3.bias",)))
    blob, losses = None, []
    for number, seeds in enumerate([(1, 2), (3, 4)]):
        losses.append(external_trainer.train(here, optimizer, batches(*seeds), 5))
        round = round_of(5, number, batches=batches(*seeds), inner_optimizer_state=blob)
        there = run_inner(state, command, round, tmp_path / "work")
        state, blob = there.state, there.inner_optimizer_state
        assert there.metrics["loss"] == losses[-1]
    assert losses[1] < losses[0]
    for key, value in here.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(state[key], value), key
    assert state["1.num_batches_tracked"] == 0  # not in the pack: the base's


def test_the_job_has_the_references_keys_in_their_order(tmp_path: Path) -> None:
    blob = StateBlob.of("application/json", b"{}")
    group = cached_microshard_group(["/cache/00000.bin"], ["1220aa"], [0], 7)
    kept = tmp_path / "kept.json"
    code = f"assert open(job['inner_optimizer_state_path']).read() == '{{}}'; shutil.copy(sys.argv[1], {str(kept)!r})"
    command = Command(script(code + "; finish()"), state_dict_filter=StateDictFilter((), ("b*",)))
    run_inner(BASE, command, round_of(batches=[group], inner_optimizer_state=blob), tmp_path / "work")
    at = tmp_path / "work" / "inner-rank00001-round000000"
    # Written by the reference's Rust side, but for paths and the name of the job.
    assert list(json.loads(kept.read_text()).items()) == [
        ("protocol_version", 1),
        ("job_id", "diloco-inner-run-0-1"),
        ("model_schema_hash", "schema"),
        ("base_parameter_pack_path", f"{at}/base-parameters"),
        ("output_parameter_pack_path", f"{at}/local-parameters"),
        ("result_manifest_path", f"{at}/result.json"),
        (
            "batches",
            [
                {
                    "kind": "cached_microshard_group",
                    "shard_paths": ["/cache/00000.bin"],
                    "microshard_ids": ["1220aa"],
                    "ordinals": [0],
                    "bytes_len": 7,
                }
            ],
        ),
        ("num_inner_steps", 3),
        ("require_exact_steps", True),
        ("state_dict_filter", {"include_globs": [], "exclude_globs": ["b*"]}),
        ("inner_optimizer_state_path", f"{at}/inner-state-input.blob"),
    ]


def test_a_micro_epoch_has_the_references_keys() -> None:
    assert micro_epoch("lease", ["a", "b"], [0, 1], 26, "indexed-dataset", {"shard_paths": ["/x"]}) == {
        "kind": "micro_epoch",
        "lease_id": "lease",
        "microshard_ids": ["a", "b"],
        "ordinals": [0, 1],
        "bytes_len": 26,
        "pipeline_kind": "indexed-dataset",
        "payload": {"shard_paths": ["/x"]},
    }


def test_the_command_finds_its_files_by_argument_or_environment_and_is_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "3"), ("MASTER_ADDR", "x"), ("TORCHELASTIC_RUN_ID", "y"), ("PYTHONPATH", "/old")):
        monkeypatch.setenv(name, value)
    code = """
e = os.environ
assert e['BURN_P2P_DILOCO_JOB_MANIFEST'] == sys.argv[1]
assert sys.argv[2] == '--to=' + e['BURN_P2P_DILOCO_RESULT_MANIFEST'] == '--to=' + job['result_manifest_path']
assert not {'RANK', 'MASTER_ADDR', 'TORCHELASTIC_RUN_ID'} & set(e)
assert (e['PYTHONPATH'], e['MINE']) == ('/first:/old', '1')
finish()
"""
    command = Command((*script(code), "--to={result_manifest}"), env={"MINE": "1"}, module_search_roots=("/first",))
    assert run_inner(BASE, command, round_of(), tmp_path / "work").steps_completed == 3


def test_a_round_gives_the_whole_state_its_metrics_and_leaves_nothing_behind(tmp_path: Path) -> None:
    code = """
open('{0}', 'w').write('seen')
finish(metrics=dict(loss=float('nan'), tokens=7, done=True, note='x'), inner_optimizer_state_path='{0}')
""".format(tmp_path / "state")
    left = tmp_path / "work" / "inner-rank00001-round000000"
    left.mkdir(parents=True)
    (left / "result.json").write_text('{"steps_completed": 3}')  # of an attempt that was killed
    result = inner(code, tmp_path)
    assert {k: (v.dtype, v.tolist()) for k, v in result.state.items()} == {
        k: (v.dtype, v.tolist()) for k, v in BASE.items()
    }
    assert math.isnan(result.metrics.pop("loss"))
    assert result.metrics == {"tokens": 7, "done": True, "note": "x"}
    assert result.inner_optimizer_state == StateBlob.of("application/octet-stream", b"seen")
    assert list((tmp_path / "work").iterdir()) == []


def test_fewer_steps_are_taken_where_they_need_not_be_exact(tmp_path: Path) -> None:
    assert inner("finish(steps_completed=2)", tmp_path, require_exact_steps=False).steps_completed == 2


# -- the state blob -------------------------------------------------------------------------------------------------


def test_a_state_blobs_id_is_the_references() -> None:
    golden = "1220227349e71cfb769223b3372b2aef5c7a9a87d2473f5cdeab5b970289f316f63d"
    assert StateBlob.of("application/json", b"{}").content_id == golden


@pytest.mark.parametrize("size", [0, 23, 24, 255, 256, 65536])
def test_a_damaged_state_blob_is_never_handed_out(tmp_path: Path, size: int) -> None:
    blob = StateBlob.of("x", bytes(i % 256 for i in range(size)))
    blob.check()
    damaged = StateBlob("x", blob.data + b"\0", blob.content_id)
    with pytest.raises(ModelError, match="inner optimizer state has content id .*: it was damaged since it was saved"):
        damaged.check()
    with pytest.raises(ModelError, match="content id"):
        run_inner(BASE, Command(TRAINER), round_of(inner_optimizer_state=damaged), tmp_path / "work")
    assert list((tmp_path / "work").iterdir()) == []


# -- what goes wrong ------------------------------------------------------------------------------------------------

PACK = "p = job['output_parameter_pack_path']; "
BROKEN = [
    ("sys.exit('no such\\nGPU 3')", "ended with status 1: GPU 3$"),
    ("os._exit(3)", "ended with status 3, without a word on stderr$"),
    ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV"),
    ("raise ValueError('bad ' + 'data')", "ended with status 1: ValueError: bad data$"),
    ("pass", "ended with status 0, but wrote no result.json"),
    ("open(job['result_manifest_path'], 'w').write('{\"steps')", "result.json that is not valid JSON: .*rename it"),
    ("json.dump([], open(job['result_manifest_path'], 'w'))", "a result.json without steps_completed"),
    ("finish(steps_completed=2)", r"completed 2 step\(s\), requested 3"),
    ("finish(steps_completed=4)", r"completed 4 step\(s\), requested 3"),
    ("finish(steps_completed='3')", "a result.json without steps_completed"),
    ("finish(metrics=dict(loss=[1]))", r"wrote metrics \{'loss': \[1\]\}: expected names with a number"),
    ("finish(local_parameter_pack_path=5)", "wrote local_parameter_pack_path 5 in its result.json: expected text"),
    ("finish(local_parameter_pack_path='/nowhere')", "cannot be used: /nowhere is no parameter pack"),
    ("finish(inner_optimizer_state_path='/no')", "inner_optimizer_state_path '/no', which cannot be read"),
    (PACK + "finish(); os.truncate(p + '/values.f32le', 8)", "byte length 8 of .* does not match parameter count 6"),
    (PACK + "finish(); open(p + '/values.f32le', 'wb').write(b'\\xff' * 24)", "are not finite, first in b: lower its"),
    (
        PACK + "finish(); m = json.load(open(p + '/manifest.json')); m['layout_hash'] = 'other'; "
        "json.dump(m, open(p + '/manifest.json', 'w'))",
        "parameter-pack layout other of .* does not match model layout torch-layout-",
    ),
    (
        PACK + "finish(); m = json.load(open(p + '/manifest.json')); m['model_schema_hash'] = 'other'; "
        "json.dump(m, open(p + '/manifest.json', 'w'))",
        "parameters of model schema other, expected schema",
    ),
]


@pytest.mark.parametrize(("code", "message"), BROKEN)
def test_a_round_that_fails_is_one_line_and_leaves_nothing_behind(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(LaunchError, match=message) as caught:
        inner(code, tmp_path)
    assert str(caught.value).startswith("inner_loop.command of rank 1 in round 0 ")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "work").iterdir()) == []


def test_all_of_stderr_that_is_kept_goes_to_the_ranks_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LaunchError, match="ended with status 1: second$"):
        inner("print('said'); sys.stderr.write('first\\nsecond\\n'); sys.exit(1)", tmp_path)
    assert capfd.readouterr() == ("said\n", "first\nsecond\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Command(("no-such-trainer", "x")), "program 'no-such-trainer' was not found: give its path"),
        (lambda: Command((str(ROOT / "README.md"),)), "README.md' was not found: give its path"),
        (lambda: Command(()), "inner_loop.command is .*: expected a list, the program first"),
        (lambda: Command("python x.py"), "inner_loop.command is 'python x.py': expected a list"),  # type: ignore[arg-type]
        (lambda: Command((" ",)), "expected a list, the program first"),
        (lambda: Command(("a", "\0")), "take no NUL bytes"),
        (lambda: Command(("a",), env={"": "x"}), "no empty names"),
        (lambda: Command(("a",), timeout=0), "inner_loop.timeout is 0: expected seconds above 0"),
        (lambda: Command(TRAINER, state_dict_filter=StateDictFilter(("x",))), "selected zero floating-point"),
    ],
)
def test_what_cannot_be_a_command_is_refused(tmp_path: Path, make: Callable[[], Command], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_inner(BASE, make(), round_of(), tmp_path / "work")


@pytest.mark.parametrize(
    ("more", "message"), [({"steps": 0}, "is asked for 0 steps"), ({"batches": []}, "requires at least one batch")]
)
def test_a_round_without_work_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(SparktrainError, match=message):
        run_inner(BASE, Command(TRAINER), round_of(**more), tmp_path / "work")


def test_a_rank_that_waits_for_its_program_says_that_it_does(tmp_path: Path) -> None:
    heartbeat.at("reads")
    assert inner("finish()", tmp_path).steps_completed == 3
    assert heartbeat._here.place == "computes"  # said again every second, or a long round would be a rank that hangs


# -- what may not survive -------------------------------------------------------------------------------------------

GRANDCHILD = """
import subprocess
child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(300)'])
open({path!r} + '.tmp', 'w').write(str(child.pid)); os.rename({path!r} + '.tmp', {path!r})
"""


def gone(pid: int, seconds: float = 20) -> bool:
    """Whether the process ends in time; what nobody has asked for its status yet counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_command_that_hangs_is_killed_with_all_it_started(tmp_path: Path) -> None:
    pid = str(tmp_path / "pid")
    code = GRANDCHILD.format(path=pid) + "sys.stderr.write('loading data\\n'); sys.stderr.flush(); time.sleep(300)"
    with pytest.raises(LaunchError, match="did not end within 3 s and was killed: loading data; raise its timeout"):
        inner(code, tmp_path, timeout=3)
    assert gone(int(Path(pid).read_text()))
    assert list((tmp_path / "work").iterdir()) == []


def test_what_a_finished_command_left_running_is_killed(tmp_path: Path) -> None:
    pid = str(tmp_path / "pid")
    assert inner(GRANDCHILD.format(path=pid) + "finish()", tmp_path).steps_completed == 3
    assert gone(int(Path(pid).read_text()))


def test_a_killed_rank_leaves_no_trainer_behind(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = GRANDCHILD.format(path=str(pid)) + "time.sleep(300)"
    rank = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, sys, tests.test_external as t; t.inner(sys.argv[1], pathlib.Path(sys.argv[2]))",
            code,
            str(tmp_path),
        ],
        cwd=ROOT,
    )
    deadline = time.monotonic() + 60
    while not pid.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    trainer = psutil.Process(int(pid.read_text())).parent()
    assert trainer is not None
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait()
    assert gone(trainer.pid)
    assert gone(int(pid.read_text()))
