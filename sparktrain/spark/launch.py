"""Start the ranks of a run and wait for them: the only module that knows TorchDistributor.

Stock TorchDistributor hides failures, loses a rank's error text, stalls 300 s on a rank that dies at teardown, aborts
on a lost log connection and leaves ranks behind. ``RankDistributor`` keeps its scheduling (barrier stage, addresses,
ports, GPUs) and hands its own launch function (``task.py``) to the inherited ``_run``, the hook that
DeepspeedTorchDistributor uses in-tree; same signature in pyspark 4.0 to 4.3.
"""

import contextlib
import re
import signal
import socketserver
import threading
import time
from typing import Any

from pyspark import cloudpickle
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.ml.torch.log_communication import LogStreamingServer, WriteLogToStdout  # type: ignore[attr-defined]
from pyspark.sql import SparkSession

from sparktrain.errors import LaunchError
from sparktrain.results import RankFailure
from sparktrain.rundir import STOP, RunDir
from sparktrain.spark import context, ending, network, task
from sparktrain.spark.watch import Verdict, hung, watching

for module in (task, ending, network):
    cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]

_NO_MEMORY = "out of memory|can't allocate memory"
_NO_MEMORY_HINT = ": lower train.micro_batch, or set model.gradient_checkpointing"
# What a file system or a network says that may be well again a moment later.
_REFUSALS = ("Changed", "OSError", "ConnectionError", "ConnectionResetError", "ConnectionRefusedError", "TimeoutError")


class _LogSocket(socketserver.ThreadingTCPServer):
    is_active = True


class LogServer(LogStreamingServer):  # type: ignore[misc]
    """Takes the ranks' lines on one of the driver's addresses; the stock one listens on all of them."""

    def start(self, spark_host_address: str = "") -> None:
        self.server = _LogSocket((spark_host_address, 0), WriteLogToStdout)
        self.port = self.server.server_address[1]
        self.serve_thread = threading.Thread(target=self.server.serve_forever, args=(0.1,), daemon=True)
        self.serve_thread.start()

    def shutdown(self) -> None:
        server = self.server
        super().shutdown()
        if server:
            server.server_close()


class RankDistributor(TorchDistributor):
    """TorchDistributor whose processes are ``python -m sparktrain.worker RUN_DIR``."""

    def run_ranks(self, job: task.Job) -> None:
        """Run all ranks to their end; raises where one fails."""
        directory, ranks = RunDir(job.run_dir), range(self.num_processes)
        heartbeats = tuple(str(directory.heartbeat(job.generation, rank)) for rank in ranks)
        self._run("sparktrain.worker", task.launch_ranks, job, str(directory.over(job.generation)), heartbeats)

    def _run_distributed_training(
        self,
        framework_wrapper_fn: Any,
        train_object: Any,
        run_pytorch_file_fn: Any,
        spark_dataframe: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """The inherited method without its second of sleep, a tenth of a small run's start, for a server to start."""
        self._check_encryption()
        logs = LogServer()
        listens, self.driver_address = context.log_addresses(self.spark)
        logs.start(listens)
        self.log_streaming_server_port = logs.port
        try:
            act = self._get_spark_task_function(
                framework_wrapper_fn, train_object, run_pytorch_file_fn, spark_dataframe, *args, **kwargs
            )
            tasks = self.spark.range(0, self.num_tasks, 1, self.num_tasks)
            tasks.mapInArrow(act, "chunk binary", barrier=True).collect()
        finally:
            logs.shutdown()


def launch(spark: SparkSession, job: task.Job, ranks: int, local: bool, use_gpu: bool) -> None:
    """Run ``ranks`` ranks of ``job`` and return when all have ended well.

    Raises :class:`LaunchError` that names the first rank that failed and why. On KeyboardInterrupt or SIGTERM the
    ranks are stopped before it goes on.
    """
    distributor = RankDistributor(num_processes=ranks, local_mode=local, use_gpu=use_gpu)
    directory = RunDir(job.run_dir)

    def end(why: str) -> None:
        directory.end(job.generation, f"{why}; stacks are in {job.log_dir}")

    try:
        heartbeats = [directory.heartbeat(job.generation, rank) for rank in range(ranks)]
        with watching(directory.config().launch, heartbeats, end) as verdict:
            if local:
                distributor.run_ranks(job)
            else:
                _run_cancellable(spark, distributor, job, verdict)
    except Exception as error:  # py4j, Spark and TorchDistributor have no common type
        raise explain(directory, job.generation, error) from error


def explain(directory: RunDir, generation: int, error: Exception) -> LaunchError:
    """One error for a failed attempt: which rank hung, or the first rank's own words, or what process ended and how, or
    Spark's reason.

    A rank's own exception is final, for it would raise it again, and so is a cancelled Spark job. All else, and what
    its operating system refused a rank, is ``transient``.
    """
    if why := hung(directory.over(generation)):
        found = LaunchError(why)
        found.transient = True
        return found
    found = _explain(directory, generation, error)
    outcomes = directory.outcomes(generation)
    causes = [o.kind for o in outcomes if isinstance(o, RankFailure) and not o.echo]
    found.transient = causes[0] in _REFUSALS if causes else "cancelled" not in str(error)
    return found


def lost_executor(error: Exception) -> str | None:
    """Which executor Spark lost, and why, where that is what ended a job with ``error``."""
    if lost := re.search(r"ExecutorLostFailure \(executor (\S+) [^)]*\) Reason: (.*)", str(error)):
        return f"executor {lost[1]} was lost: {lost[2].rstrip('.')}"
    if "Python worker exited unexpectedly" in str(error):
        return "a Python worker of Spark's was lost"
    return None


def _explain(directory: RunDir, generation: int, error: Exception) -> LaunchError:
    failures = [o for o in directory.outcomes(generation) if isinstance(o, RankFailure)]
    causes = [f for f in failures if not f.echo]
    exits = directory.exits(generation)
    if causes:
        first = causes[0]
        where = f"rank {first.rank} on {first.host} failed: {first.kind}: "
        no_memory = first.kind == "MemoryError" or re.search(_NO_MEMORY, first.message, re.IGNORECASE)
        hint = _NO_MEMORY_HINT if no_memory else ""
        found = LaunchError(f"{'' if first.kind == 'Stopped' else where}{first.message}{hint}")
        found.exit_code = first.exit_code if first.exit_code != 1 else LaunchError.exit_code
        return found
    # What takes a rank with it comes before the rank.
    for exit_ in exits:
        if exit_["launcher"] == "torchrun" and exit_["status"] < 0:
            return LaunchError(f"torchrun of task {exit_['node']} on {exit_['host']} {_how(exit_['status'])}")
    if executor := lost_executor(error):
        return LaunchError(executor)
    killed = [(exit_, rank, status) for exit_ in exits for rank, status in _statuses(exit_)]
    known = {f.rank for f in failures}
    # SIGTERM is what torchrun sends to those that are left; a rank may end by it, or itself when its grace is over.
    ended = (-signal.SIGTERM, 128 + signal.SIGTERM)
    for exit_, rank, status in sorted(killed, key=lambda k: (k[1] in known, k[2] in ended, k[1])):
        if rank not in known:
            last = next((line for line in reversed(exit_["tail"]) if line.startswith(f"[rank {rank} ")), "no output")
            return LaunchError(f"rank {rank} on {exit_['host']} {_how(status)}; its last line: {last}")
    if failures:
        first = failures[0]
        return LaunchError(f"rank {first.rank} on {first.host} lost the other ranks: {first.message}")
    return LaunchError(f"Spark could not run the ranks: {_reason(error)}")


def _run_cancellable(spark: SparkSession, distributor: RankDistributor, job: task.Job, verdict: Verdict) -> None:
    """Run in a thread of its own, so that this one can cancel it."""
    jobs = context.Jobs(spark, f"sparktrain-{job.run_id}-{job.generation}", f"sparktrain ranks of {job.run_dir}")
    done, errors = threading.Event(), []

    def run() -> None:
        try:
            distributor.run_ranks(job)
        except Exception as error:
            errors.append(error)
        finally:
            done.set()

    jobs.start(run)
    try:
        while not done.wait(0.2):
            if verdict.is_ignored():
                jobs.cancel()
    except BaseException:
        directory, deadline = RunDir(job.run_dir), time.monotonic() + job.grace
        with contextlib.suppress(OSError):
            directory.request_path(STOP).touch()
        # Where Spark was interrupted too, it will never say that ranks are done: they say so themselves, and together.
        while not (done.wait(0.1) or directory.has_outcome(job.generation)) and time.monotonic() < deadline:
            pass
        ending = directory.has_outcome(job.generation)
        done.wait(1 if ending else 0)
        with contextlib.suppress(Exception):  # nor take a word; py4j's errors have no common type
            jobs.cancel()
            done.wait(1 if ending else 10)
        raise
    if errors:
        raise errors[0]


def _statuses(exit_: dict[str, Any]) -> list[tuple[int, int]]:
    """(rank, exit status) of the ranks that a task saw end badly: by torchrun's report, or its own where it has started
    the rank itself."""
    text = "\n".join(exit_["tail"])
    pairs = re.findall(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+)", text)
    direct = exit_["launcher"] == "direct"
    return [(int(exit_["node"]), int(exit_["status"]))] if direct else [(int(rank), int(s)) for rank, s in pairs]


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    hint = " (killed from outside, often for lack of memory: lower train.micro_batch)" if status == -9 else ""
    return f"was ended by {name}{hint}"


def _reason(error: Exception) -> str:
    """Spark's reason in one line: the root cause, without the JVM's stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if re.match(r"(Caused by: |[\w.]+(Exception|Error): )", line)]
    return (causes[-1] if causes else lines[0] if lines else type(error).__name__)[:400]
