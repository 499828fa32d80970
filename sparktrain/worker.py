"""The door between the floors: one rank of a run, given the run directory and nothing else.

Started by Spark (``spark/task.py``) or by hand, with the same result::

    torchrun --nproc-per-node 2 -m sparktrain.worker RUN_DIR

``python -m sparktrain.worker --describe`` reads a config on stdin and prints, as JSON, what training it would need, and
``--evaluate`` what a model's loss is on a share of some data; the driver asks that of an executor, because the driver
itself never imports torch.
"""

import contextlib
import json
import os
import re
import socket
import sys
import traceback

from sparktrain import failpoints, heartbeat
from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, Orphaned, SparktrainError
from sparktrain.evaluation import Work
from sparktrain.parent import follow_parent, is_orphan
from sparktrain.plan import PlanSpec
from sparktrain.redaction import hidden
from sparktrain.results import RankFailure, RankResult
from sparktrain.rundir import RunDir

_OF_TORCH = ("RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError")
# What a healthy rank raises when another one is gone: it tells that something failed, not what.
_ECHO = re.compile(r"gloo|nccl|connection closed by peer|connection reset|broken pipe|socket|store|timed out", re.I)


def run_rank(run_dir: str) -> RankResult:
    """Train as the rank that the environment names (``RANK``, ``WORLD_SIZE``, set by torchrun); 1 rank without it.

    Writes the rank's output file, :class:`RankResult` or :class:`RankFailure`, and returns or raises the same.
    """
    follow_parent()
    if (starter := os.environ.get("SPARKTRAIN_TASK")) and is_orphan(int(starter)):
        raise Orphaned("what started this rank was gone before it began")
    try:
        failpoints.arm(os.environ.get("SPARKTRAIN_FAILPOINT", ""))
    except ValueError as error:
        raise ConfigError(f"SPARKTRAIN_FAILPOINT: {error}") from None
    directory, rank = RunDir(run_dir), _variable("RANK")
    with contextlib.ExitStack() as held:
        generation = _variable("SPARKTRAIN_GENERATION")
        if not generation and rank == 0:  # started by hand: no driver owns the run, so rank 0 does
            _plan_of(directory)  # where there is no run, no attempt is made
            held.enter_context(directory.lock())
            directory.new_generation()
        try:
            config, spec = _plan_of(directory)
            if generation:  # a driver watches
                file = directory.heartbeat(generation, rank)
                held.enter_context(heartbeat.beating(file, rank, socket.gethostname(), os.getpid(), config.launch))
            from sparktrain.train.loop import train  # the torch floor: imported by ranks only

            outcome = train(directory, config, spec, generation or directory.latest_generation())
        except BaseException as error:
            if number := generation or directory.latest_generation():
                directory.write_outcome(number, _failure(rank, error))
            raise
        directory.write_outcome(generation or directory.latest_generation(), outcome)
    return outcome


def _plan_of(directory: RunDir) -> tuple[RunConfig, PlanSpec]:
    config, spec = directory.config(), directory.plan_spec()
    if spec is None:
        raise ConfigError(f"run directory {directory.path} has no plan: start the run with jobs/train.py")
    return config, spec


def describe(config_json: str) -> str:
    """Model size and traffic of a run, as JSON: see :func:`sparktrain.train.describe.describe`."""
    from sparktrain.train.describe import describe as describe_run

    # It is no rank of what its environment may name.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)

    return json.dumps(describe_run(RunConfig.model_validate_json(config_json)))


def evaluate(work_json: str) -> str:
    """The loss of one share of a split, as JSON: see :func:`sparktrain.train.evaluate.measure`."""
    from sparktrain.train.evaluate import measure

    follow_parent()
    return measure(Work.model_validate_json(work_json)).model_dump_json()


_ASKED = {"--describe": describe, "--evaluate": evaluate}


def main(argv: list[str]) -> None:
    """What this module does as a program; exits with an error's code after one line for what the user can mend."""
    asked = _ASKED.get(argv[0]) if len(argv) == 1 else None
    try:
        if asked:
            print(asked(sys.stdin.read()))
        elif len(argv) == 1 and not argv[0].startswith("-"):
            run_rank(argv[0])
        else:
            raise ConfigError("give a run directory: torchrun --nproc-per-node 2 -m sparktrain.worker RUN_DIR")
    except SparktrainError as known:
        print(f"error: {hidden(' '.join(str(known).split()))}", file=sys.stderr)
        sys.exit(known.exit_code)
    except Exception as unknown:
        first = f"error: {type(unknown).__name__}: {str(unknown).partition(chr(10))[0]}\n"
        # Not raised: Python would print it as it is, into a log that stays.
        sys.stderr.write(hidden(first if asked else traceback.format_exc()))
        sys.exit(1)


def _variable(name: str) -> int:
    value = os.environ.get(name, "0")
    if not value.isdecimal():
        raise ConfigError(f"{name} is {value!r}: expected a whole number, as torchrun sets it; unset it")
    return int(value)


def _failure(rank: int, error: BaseException) -> RankFailure:
    # torch.OutOfMemoryError and our own one-line errors are causes whatever their text says.
    lost = type(error).__name__ in _OF_TORCH and bool(_ECHO.search(str(error)))
    return RankFailure(
        rank=rank,
        host=socket.gethostname(),
        kind=type(error).__name__,
        message=hidden(str(error)),
        traceback=hidden("".join(traceback.format_exception(error))),
        exit_code=error.exit_code if isinstance(error, SparktrainError) else 1,
        echo=lost or isinstance(error, Orphaned),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
