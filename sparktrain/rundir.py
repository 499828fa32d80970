"""The run directory: every file of a run, who writes it and who reads it, and nowhere else.

::

    run.json             driver   identity of the run; written once
    config.json          driver   resolved settings; ranks read them
    plan/*.parquet       driver   the plan (executors); ranks read their rows
    digests/*.u4         driver   what each sequence's bytes are (executors); ranks compare as they read
    plan.json            driver   what the plan is a function of; written last, so a plan without it does not exist
    LOCK                 driver   who is running it now; removed at the end
    SAVE, STOP           anyone   asks for a checkpoint now, or for one and the end; rank 0 removes SAVE, a start both
    changes/             anyone   see changes.py
    gen/000001/          driver   one attempt; made by an atomic mkdir
      rank-00000.pickle  rank     its result or failure (results/)
      exit-00000.json    task     how the rank's process ended, and its last lines
      heartbeat-00000.json  rank  where it is, every second or so, in place (heartbeat.py)
      over.json          driver   which rank hangs: tasks kill theirs
      records-00000-000000100.parquet   rank   its steps up to a checkpoint
      receipts-00000-000000100.parquet  rank   what it read for them (receipts.py)
      pulse-00000.json   rank     how far it is, every second (pulse.py)
      logs/              torchrun what each rank printed
    checkpoints/         ranks    see checkpoints.py
    model/               rank 0   the trained model, a Hugging Face directory
    metrics.parquet      driver   one row per step and rank
    windows.parquet      driver   one row per window and rank (windows.py)
    result.json          driver   the summary; written last, so a run without it is not finished
    report.html          anyone   a page about it (report/page.py)

Single files are written under a temporary name and renamed, so that no reader ever sees half of one. In an object
store (``storage.py``) they are objects, which are whole or not there; an attempt's number is taken by making its object
``begun``, and ``LOCK.*.beat`` says that the owner lives.
"""

import contextlib
import datetime
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparktrain import storage
from sparktrain.atomic import read_json, write_json, write_table
from sparktrain.checkpoints import Checkpoints
from sparktrain.config import RunConfig
from sparktrain.config.section import differences
from sparktrain.errors import ConfigError
from sparktrain.lock import Held, hold
from sparktrain.plan import PlanSpec
from sparktrain.results import Asked, RankResult, RunResult, read_records
from sparktrain.results.attempts import Attempts

FORMAT, SAVE, STOP = 1, "SAVE", "STOP"


def is_run(path: Path) -> bool:
    """Whether a run has claimed ``path``."""
    return (path / "run.json").exists()


class RunDir(Attempts):
    """The run directory at ``path``. Making the object touches nothing."""

    def __init__(self, path: str | Path) -> None:
        try:
            super().__init__(storage.place(path))
        except storage.Unusable as error:
            raise ConfigError(f"run.dir {error}") from None
        self._held: Held | None = None
        self._attempt = 0
        self.plan = self.path / "plan"
        self.digests = self.path / "digests"
        self.model = self.path / "model"
        self.report = self.path / "report.html"
        self.checkpoints = Checkpoints(self.path)

    # -- the driver's side ---------------------------------------------------------------------------------------

    def check(self, config: RunConfig) -> None:
        """Raises :class:`ConfigError` where the directory holds anything but this run, naming settings that differ."""
        if not (self.path / "run.json").exists():
            self._check_free()
            return
        try:
            known = read_json(self.path / "run.json")
            known["format"], known["identity"], known["run_id"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ConfigError(f"run.dir {self.path} has a run.json that is none: choose another run.dir") from None
        if known["format"] != FORMAT:
            raise ConfigError(
                f"run.dir {self.path} has format {known['format']}, this sparktrain writes {FORMAT}: "
                "choose another run.dir"
            )
        changed = differences(known["identity"], config.identity())
        if changed:
            raise ConfigError(
                f"run.dir {self.path} holds another run: {'; '.join(changed[:3])}"
                f"{f' (and {len(changed) - 3} more)' if len(changed) > 3 else ''}: choose another run.dir"
            )

    def claim(self, config: RunConfig) -> None:
        """Make the directory this run's, once :meth:`check` has passed and the run can start."""
        self.check_owner()
        if not (self.path / "run.json").exists():
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            made = {"format": FORMAT, "run_id": uuid.uuid4().hex, "created": now, "identity": config.identity()}
            write_json(self.path / "run.json", made)
        write_json(self.path / "config.json", config.model_dump(mode="json"))

    def run_id(self) -> str:
        """32 hex digits that name this run and no other."""
        return str(read_json(self.path / "run.json")["run_id"])

    def _check_free(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"run.dir {self.path} is a file: choose another run.dir")
        found = list(self.path.iterdir()) if self.path.is_dir() else []
        # What a start that was killed before it wrote run.json may leave.
        ours = [p for p in found if p.name.startswith(".probe-") or (p.name.startswith(".") and p.suffix == ".tmp")]
        if any(not p.name.startswith("LOCK") and p not in ours for p in found):
            raise ConfigError(f"run.dir {self.path} is not empty and holds no sparktrain run: choose another run.dir")
        for leftover in ours:
            leftover.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory for one writer; raises :class:`sparktrain.errors.RunDirBusy` naming the holder."""
        self._make()
        try:
            with hold(self.path / "LOCK", f"run.dir {self.path}", self._lost) as self._held:
                yield
        finally:
            self._held = None
            with contextlib.suppress(OSError):
                self.path.rmdir()  # where nothing was written, nothing is left

    def check_owner(self) -> None:
        """Raises :class:`sparktrain.errors.Superseded` where another process took over what this one had locked."""
        if self._held:
            self._held.check()

    def _lost(self, why: str) -> None:
        if self._attempt:
            with contextlib.suppress(OSError):
                self.end(self._attempt, why)

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run.dir {self.path} cannot be made: {error.strerror}; choose another run.dir") from None
        if storage.is_local(self.path) and not os.access(self.path, os.W_OK):
            raise ConfigError(
                f"run.dir {self.path} cannot be written: change its permissions or choose another run.dir"
            )

    def request_path(self, name: str) -> Path:
        """Whose being there asks the running attempt for something: ``SAVE`` or ``STOP``."""
        return self.path / name

    def new_generation(self) -> int:
        """Start an attempt: the first free number, taken in a way that only one caller can win."""
        self.check_owner()
        self._sweep()
        for name in (SAVE, STOP):
            self.request_path(name).unlink(missing_ok=True)
        number = self.latest_generation() + 1
        while True:
            try:
                storage.claim(self.generation(number))
                self._attempt = number
                return number
            except FileExistsError:
                number += 1

    def _sweep(self) -> None:
        """Remove what processes of attempts that are over had half written when they were killed."""
        if storage.is_local(self.path):
            for half in self.path.glob("gen/*/*.tmp"):
                half.unlink(missing_ok=True)

    def drop_plan(self) -> None:
        """There is no plan any more, whatever is left of its files."""
        self.check_owner()
        (self.path / "plan.json").unlink(missing_ok=True)

    def write_plan_spec(self, spec: PlanSpec) -> None:
        self.check_owner()
        write_json(self.path / "plan.json", spec.to_json())

    def write_result(self, result: RunResult) -> None:
        self.check_owner()
        self._sweep()
        write_table(self.path / "metrics.parquet", result.rank_table)
        write_table(self.path / "windows.parquet", result.windows)
        write_json(self.path / "result.json", result.summary())

    def finished(self) -> RunResult | None:
        """The result of the attempt that finished, if one did."""
        if not ((self.path / "result.json").exists() and (self.model / "config.json").exists()):
            return None
        for number in range(self.latest_generation(), 0, -1):
            outcomes = self.outcomes(number)
            if outcomes and all(isinstance(o, RankResult) for o in outcomes):
                return self.merge([o for o in outcomes if isinstance(o, RankResult)])
        return None

    def merge(self, outcomes: Sequence[RankResult]) -> RunResult:
        """The run's result: what the ranks of its last attempt hand back, after the steps of those before it."""
        earlier = []
        for checkpoint in self.checkpoints.lineage(outcomes[0].resumed_from if outcomes else None):
            for rank in range(checkpoint.world):
                earlier += read_records(self.records(checkpoint.generation, rank, checkpoint.step).read_bytes())
        spec = self.plan_spec()
        return RunResult.merge(str(self.path), outcomes, earlier, [Asked(*one) for one in spec.asked] if spec else ())

    # -- a rank's side -------------------------------------------------------------------------------------------

    def config(self) -> RunConfig:
        """The resolved settings. Raises :class:`ConfigError` where this is no run directory."""
        file = self.path / "config.json"
        if not file.exists():
            raise ConfigError(f"{self.path} is no run directory: it has no config.json; start it with jobs/train.py")
        try:
            return RunConfig.model_validate_json(file.read_bytes())
        except ValueError:
            raise ConfigError(f"{file} is torn or of another sparktrain: start the run again") from None

    def plan_spec(self) -> PlanSpec | None:
        """What the plan on disk is a function of; None where no plan was completed."""
        try:
            spec = PlanSpec.from_json(read_json(self.path / "plan.json"))
        except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return spec if any(self.plan.glob("*.parquet")) else None
