"""What a run directory has of each attempt: ``gen/000001`` and so on, see ``rundir.py``."""

from pathlib import Path
from typing import Any

from sparktrain.atomic import read_json, write, write_json
from sparktrain.errors import LaunchError, Superseded
from sparktrain.results.outcome import Outcome, RankFailure, RankResult, dump_outcome, load_outcome


class Attempts:
    """Those of the run directory ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def latest_generation(self) -> int:
        """The newest attempt's number; 0 before the first."""
        names = [p.name for p in (self.path / "gen").glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def check_newest(self, generation: int) -> None:
        """Raises :class:`Superseded` where there is a newer attempt than ``generation``, which may not write then."""
        if self.latest_generation() > generation:
            raise Superseded(f"attempt {generation} was superseded: a newer one runs in {self.path}")

    def generation(self, number: int) -> Path:
        return self.path / "gen" / f"{number:06d}"

    def logs(self, number: int) -> Path:
        return self.generation(number) / "logs"

    def pulse(self, generation: int, rank: int) -> Path:
        return self.generation(generation) / f"pulse-{rank:05d}.json"

    def records(self, generation: int, rank: int, step: int) -> Path:
        """A rank's steps from the checkpoint before to that at ``step``."""
        return self.generation(generation) / f"records-{rank:05d}-{step:09d}.parquet"

    def heartbeat(self, generation: int, rank: int) -> Path:
        return self.generation(generation) / f"heartbeat-{rank:05d}.json"

    def over(self, generation: int) -> Path:
        return self.generation(generation) / "over.json"

    def end(self, generation: int, why: str) -> None:
        """Have the tasks of an attempt kill its ranks."""
        write_json(self.over(generation), {"why": why})

    def receipts(self, generation: int, rank: int, step: int) -> Path:
        """What a rank read from the file before to ``step``."""
        return self.generation(generation) / f"receipts-{rank:05d}-{step:09d}.parquet"

    def outcomes(self, generation: int) -> list[Outcome]:
        """Every output file of an attempt, by rank."""
        files = sorted(self.generation(generation).glob("rank-*.pickle"))
        found = [load_outcome(file.read_bytes(), str(file)) for file in files]
        for file, outcome in zip(files, found, strict=True):
            if file.name != f"rank-{outcome.rank:05d}.pickle":
                raise LaunchError(f"output file {file} is that of rank {outcome.rank}: remove it")
        return found

    def has_outcome(self, generation: int) -> bool:
        """Whether any rank of an attempt has handed back something."""
        return any(self.generation(generation).glob("rank-*.pickle"))

    def exits(self, generation: int) -> list[dict[str, Any]]:
        """How the processes of an attempt ended, as their Spark tasks saw it (``task.py``)."""
        return [read_json(file) for file in sorted(self.generation(generation).glob("exit-*.json"))]

    def write_outcome(self, generation: int, outcome: RankResult | RankFailure) -> None:
        write(self.generation(generation) / f"rank-{outcome.rank:05d}.pickle", dump_outcome(outcome))

    def write_exit(self, generation: int, exit_: dict[str, Any]) -> None:
        write_json(self.generation(generation) / f"exit-{exit_['node']:05d}.json", exit_)
