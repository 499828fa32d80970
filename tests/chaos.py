"""Kill a training run's processes at random moments, again and again: it is to end as if nothing had happened.

::

    python -m tests.chaos --kills 24 --seed 1 --directory /tmp/chaos [settings of jobs/train.py]

trains once undisturbed; then again, on two executors of their own (``local-cluster``), while a process chosen by chance
is killed at moments chosen by chance: a rank (or stopped, so that it hangs), a torchrun, an executor, the driver's JVM
or its Python. The same command is started again when it has ended, as a user would. In the end digest, losses and
learning rates of all steps must be those of the undisturbed run, to the bit; ``verify`` must find the run directory
whole; the audit of its ledger must find every sequence read exactly once, with the bytes of the shards; and no process
and no temporary file may be left. Prints every kill; status 1 where anything differs.
"""

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sparktrain import heartbeat
from sparktrain.errors import DataError
from sparktrain.results import RunResult
from sparktrain.rundir import RunDir
from sparktrain.verify import Verify, verify
from tests.conftest import ROOT, tiny_argv, write_shards

VICTIMS = ("rank", "stopped rank", "torchrun", "executor", "driver JVM", "driver Python")
DRIVERS = ("driver JVM", "driver Python")
# Exit statuses of a run that is to be started again: its driver was killed, or it gave up on a cluster that we broke.
AGAIN = (-signal.SIGKILL, 128 + signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM, 7)
_GONE_SECONDS = 20.0
_LIMIT_SECONDS = 3600.0


@dataclass
class Chaos:
    """A disturbed run: ``argv`` for jobs/train.py, in ``directory``. By ``seed``, a kill comes so many seconds as
    ``pause`` says after its ranks have taken a step, or, one in four, after the last kill, wherever the run is then.

    ``started``: every process of it that was ever seen.
    """

    argv: list[str]
    directory: RunDir
    victims: list[str]
    pause: tuple[float, float]
    seed: int
    started: set[psutil.Process] = field(default_factory=set)
    kills: int = 0
    starts: int = 0
    struck: int = 0  # the attempt of the last kill

    def run(self) -> None:
        """Until the run has ended well. Raises AssertionError where it ends in another way than a kill explains."""
        chance, began, left = random.Random(self.seed), time.monotonic(), list(self.victims)
        due, patient, driver = 0.0, True, self._start()
        while (status := driver.poll()) != 0:
            assert time.monotonic() - began < _LIMIT_SECONDS, "it takes too long"
            self.started |= self._processes()
            if status is not None:
                text = self._log().read_text(errors="replace")
                assert status in AGAIN, f"the driver ended with status {status}:\n{text[-4000:]}"
                self._wait_until_gone(driver)
                driver = self._start()
            elif left and not due:
                if not patient or self._trains():
                    due = time.monotonic() + chance.uniform(*self.pause)
            elif left and time.monotonic() > due and (victim := self._find(left[0], chance)):
                self._kill(left.pop(0), victim)
                due, patient = 0.0, chance.random() < 0.75
            time.sleep(0.2)
        assert not left, f"the run ended after {self.kills} kills: take more steps"
        self._wait_until_gone(driver)

    def _start(self) -> psutil.Popen:
        self.starts += 1
        submit = [
            *("spark-submit", "--master", "local-cluster[2,1,2048]"),
            *("--properties-file", str(ROOT / "conf" / "spark-defaults.conf"), "--conf", "spark.ui.enabled=false"),
            *("--conf", "spark.driver.host=127.0.0.1", "--conf", "spark.driver.bindAddress=127.0.0.1"),
        ]
        paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        paths |= {"PYSPARK_PYTHON": sys.executable, "TMPDIR": str(temporary_of(self.directory))}
        paths |= {"SPARK_LOCAL_DIRS": str(self.directory.path.parent / "spark")}
        with open(self._log(), "wb") as log:
            return psutil.Popen(
                [*submit, str(ROOT / "jobs" / "train.py"), *self.argv],
                env=os.environ | paths,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self) -> Path:
        return self.directory.path.parent / f"driver-{self.starts:02d}.log"

    def _processes(self) -> set[psutil.Process]:
        """All of the run that are there: those with its directory on their command line, and what they started."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.directory.path) in process.cmdline() and process.pid != os.getpid():
                    found |= {process, *process.children(recursive=True)}
        return found

    def _find(self, kind: str, chance: random.Random) -> psutil.Process | None:
        """A process of that kind; None: there is none at the moment."""
        found = []
        for process in sorted(self._processes(), key=lambda p: p.pid):
            with contextlib.suppress(psutil.Error):
                if kind_of(process) == kind.removeprefix("stopped ") and is_alive(process):
                    found.append(process)
        if kind == "stopped rank":  # one that has come so far as to follow its parent; before, only SIGKILL is fair
            begun = {beat.pid for beat in self._heartbeats()}
            found = [process for process in found if process.pid in begun]
        if kind in ("rank", "stopped rank", "torchrun") and len(found) < 2:
            return None  # an attempt that is just starting or ending
        return chance.choice(found) if found else None

    def _heartbeats(self) -> list[heartbeat.Heartbeat]:
        return heartbeat.read(self.directory.generation(self.directory.latest_generation()).glob("heartbeat-*.json"))

    def _trains(self) -> bool:
        """Whether ranks take steps in an attempt that was not struck yet."""
        return self.directory.latest_generation() > self.struck and any(b.step >= 0 for b in self._heartbeats())

    def _kill(self, kind: str, victim: psutil.Process) -> None:
        self.kills += 1
        generation = self.struck = self.directory.latest_generation()
        where = max((beat.step for beat in self._heartbeats()), default=-1)
        step = f"step {where}" if where >= 0 else "before its first step"
        with contextlib.suppress(psutil.Error):
            victim.send_signal(signal.SIGSTOP if kind.startswith("stopped") else signal.SIGKILL)
        print(
            f"{time.strftime('%H:%M:%S')}  kill {self.kills} of {len(self.victims)}: {kind} (process {victim.pid}), "
            f"attempt {generation}, {step}, newest checkpoint {self.directory.checkpoints.latest_step()}",
            flush=True,
        )

    def _wait_until_gone(self, driver: psutil.Popen) -> None:
        """Nothing that the driver started outlives it for long."""
        driver.wait()
        deadline = time.monotonic() + _GONE_SECONDS
        while left := [process for process in self.started | self._processes() if is_alive(process)]:
            assert time.monotonic() < deadline, f"left behind: {[(p.pid, p.cmdline()[:6]) for p in left]}"
            time.sleep(0.1)


def kind_of(process: psutil.Process) -> str:
    """Which of ``VICTIMS`` a process of the run is; "" for others."""
    line = process.cmdline()
    if "org.apache.spark.executor.CoarseGrainedExecutorBackend" in line:
        return "executor"
    if "org.apache.spark.deploy.SparkSubmit" in line:
        return "driver JVM"
    if "torch.distributed.run" in line:
        return "torchrun"
    if "sparktrain.worker" in line and "--describe" not in line:
        return "rank"
    return "driver Python" if str(ROOT / "jobs" / "train.py") in line else ""


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def temporary_of(directory: RunDir) -> Path:
    """Where the processes of the run put temporary files."""
    made = directory.path.parent / "tmp"
    made.mkdir(exist_ok=True)
    return made


def differences(disturbed: RunDir, undisturbed: RunResult) -> Iterator[str]:
    """What is otherwise than in the undisturbed run, or left behind."""
    result = disturbed.finished()
    if result is None:
        yield "the run is not finished"
        return
    if result.digest != undisturbed.digest:
        yield f"digest {result.digest}, undisturbed {undisturbed.digest}"
    for name in ("step", "loss", "tokens", "lr", "grad_norm"):
        mine, theirs = result.table[name].to_pylist(), undisturbed.table[name].to_pylist()
        if mine != theirs:
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), -1)
            yield f"{name} of {len(mine)} steps, undisturbed {len(theirs)}; the first to differ is that of row {at}"
    with contextlib.suppress(DataError):  # its summary of what it has said before
        yield from (line for line in verify(Verify(run_dir=disturbed.path)) if not line.startswith("ok"))
    yield from audit_of(disturbed)
    hidden = [p for p in disturbed.path.rglob(".*") if not p.name.endswith(".crc")]
    # Spark's own JVM, when it is killed, leaves its directories; torch has one for its cache.
    theirs = ("spark-", "blockmgr-", "artifact", "hsperfdata", "torchinductor_")
    foreign = [p for p in temporary_of(disturbed).iterdir() if not p.name.startswith(theirs)]
    locks = [p for p in [disturbed.path / "LOCK"] if p.exists()]
    yield from (f"left behind: {path}" for path in [*hidden, *foreign, *locks])


def audit_of(directory: RunDir) -> Iterator[str]:
    """What ``jobs/plan.py --audit`` finds wrong; prints what it counts."""
    job = [sys.executable, str(ROOT / "jobs" / "plan.py"), "--audit", str(directory.path)]
    done = subprocess.run(job, capture_output=True, text=True, env=os.environ | {"PYSPARK_PYTHON": sys.executable})
    print(*(line for line in done.stdout.splitlines() if "planned" in line), sep="\n", flush=True)
    if done.returncode:
        yield f"the audit's status is {done.returncode}: {done.stdout}{done.stderr[-1000:]}"


def deck(kills: int, seed: int) -> list[str]:
    """So many victims, each kind as often as the others, in an order by chance."""
    chance, drawn = random.Random(f"victims {seed}"), []
    while len(drawn) < kills:
        drawn += chance.sample(VICTIMS, len(VICTIMS))
    return drawn[:kills]


def argv_of(base: Path, run_dir: Path, steps: int, more: list[str]) -> list[str]:
    return tiny_argv(
        base,
        run_dir,
        *("--train.steps", str(steps), "--run.log-every", "500", "--checkpoint.every", "40"),
        *("--launch.max-restarts", "1000", "--launch.grace", "2", "--launch.step-timeout", "10"),
        *("--launch.collective-timeout", "60"),
        *more,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--pause", type=float, nargs=2, default=(1.0, 8.0), help="seconds before a kill, from and to")
    parser.add_argument("--directory", type=Path, required=True, help="a new directory for everything")
    asked, more = parser.parse_known_args()
    base = asked.directory.absolute()
    if base.exists():
        parser.error(f"--directory {base} is there already: choose another or remove it")
    base.mkdir(parents=True)
    write_shards(base / "train", shards=4, tokens=200_000)
    print(f"seed {asked.seed}, {asked.kills} kills, {asked.steps} steps", flush=True)

    quiet_dir, chaos_dir = RunDir(base / "quiet" / "run"), RunDir(base / "chaos" / "run")
    quiet = Chaos(argv_of(base, quiet_dir.path, asked.steps, more), quiet_dir, [], (0, 0), 0)
    argv, victims = argv_of(base, chaos_dir.path, asked.steps, more), deck(asked.kills, asked.seed)
    chaos = Chaos(argv, chaos_dir, victims, tuple(asked.pause), asked.seed)
    for run in (quiet, chaos):
        run.directory.path.parent.mkdir()
        began = time.monotonic()
        run.run()
        took = time.monotonic() - began
        print(
            f"{'disturbed' if run.victims else 'undisturbed'}: {took:.0f} s, {run.kills} kills, "
            f"{run.starts} starts of the command, {run.directory.latest_generation()} attempts",
            flush=True,
        )
    undisturbed = quiet_dir.finished()
    assert undisturbed is not None
    return report(chaos_dir, undisturbed)


def report(disturbed: RunDir, undisturbed: RunResult) -> int:
    """Print the comparison; 0: nothing is otherwise."""
    found = list(itertools.islice(differences(disturbed, undisturbed), 20))
    for line in found:
        print(f"DIFFERS  {line}")
    if not found:
        print(
            f"the same: digest {undisturbed.digest[:16]}, losses, learning rates, gradient norms and tokens of "
            f"{undisturbed.table.num_rows} steps; nothing left behind"
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
