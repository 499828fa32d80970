"""What runs inside a Spark task: start this task's ranks, or report on its executor.

Functions of this module are pickled by value (``launch.py`` registers it so), because they are what makes
``sparktrain`` importable there: Spark puts ``--py-files`` on the worker's ``sys.path`` only, where a rank's own process
does not find them. So this module imports the standard library at the top and everything else inside functions.
"""

import collections
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sparktrain.spark.ending import die_with_parent, stop, with_attempt
from sparktrain.spark.network import interface_to, meeting_file, own_address

_TAIL_LINES = 40
_PACKAGES = ("sparktrain", "torch", "transformers", "numpy", "pyarrow", "pyspark")


@dataclass(frozen=True)
class Job:
    """What a task needs to know to start its ranks.

    Args:
        log_dir: where torchrun keeps the lines of each rank.
        import_path: the driver's ``sys.path``: ranks look there after what the executor has.
        threads: CPU threads per rank.
        grace: seconds ranks have to end after SIGTERM, with a checkpoint, before they are killed.
    """

    run_dir: str
    log_dir: str
    generation: int
    run_id: str
    import_path: tuple[str, ...]
    threads: int
    launcher: str
    grace: float


def launch_ranks(input_params: dict[str, Any], module: str, job: Job, over: str, heartbeats: tuple[str, ...]) -> None:
    """Run ``python -m module job.run_dir`` as this task's ranks, until all have ended, or file ``over`` says that the
    attempt has. ``heartbeats``: the files in which ranks say where they are, by rank.

    Stands where TorchDistributor's ``_run_training_on_pytorch_file`` stood: called in a barrier task, or in the
    driver in local mode. Streams the ranks' lines to the driver as ``[rank 3 host]``. Raises RuntimeError where
    a rank ends with another status than 0, after writing down how.
    """
    local = bool(input_params["local_mode"])
    nodes = 1 if local else int(input_params["num_tasks"])
    per_node = int(input_params["num_processes"]) // nodes
    node = 0 if local else int(os.environ["NODE_RANK"])
    environment = _environment(job, "127.0.0.1" if local else os.environ["MASTER_ADDR"])
    work = _work_dir(job)
    environment |= {"TMPDIR": work} if work else {}
    log_dir = os.path.join(work, "logs") if work else job.log_dir
    meeting = ""
    if job.launcher == "direct":
        environment |= {"RANK": str(node), "LOCAL_RANK": "0", "WORLD_SIZE": str(nodes)}
        command, prefix = [sys.executable, "-u", "-m", module, job.run_dir], f"[rank {node} {socket.gethostname()}] "
    else:
        meeting = meeting_file() if local else ""
        command, prefix = [*_torchrun(meeting, nodes, node, per_node, job, log_dir), "-m", module, job.run_dir], ""
    child = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=die_with_parent if sys.platform == "linux" else None,
    )
    mine = heartbeats[node * per_node : (node + 1) * per_node]
    try:
        with with_attempt(child, job.run_dir, over, mine):
            tail = _pump(child, prefix, input_params.get("log_streaming_client"))
            child.wait()
    finally:
        stop(child, job.grace)
        with suppress(OSError):
            os.unlink(meeting)
        if work:
            _upload(work, job.log_dir)
    if child.returncode != 0:
        _write_exit(job, node, child.returncode, tail)
        raise RuntimeError(f"ranks of task {node} on {socket.gethostname()} ended with status {child.returncode}")


def _torchrun(meeting: str, nodes: int, node: int, per_node: int, job: Job, log_dir: str) -> list[str]:
    if meeting:
        where = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint={meeting}"]
        where += [f"--rdzv-id={job.run_id}-{job.generation}", "--local-addr=127.0.0.1"]
    else:
        endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        # A rendezvous id of its own: TorchDistributor's constant 0 lets a rank of a dead run join this one.
        where = [f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job.run_id}-{job.generation}", f"--node-rank={node}"]
        if own := own_address(os.environ["MASTER_ADDR"]):
            where.append(f"--local-addr={own}")  # rank 0's store is opened on that alone
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={per_node}",
        *where,
        f"--log-dir={log_dir}",  # without it torchrun leaves a directory in /tmp for each rank
        "--tee=3",
    ]


def _environment(job: Job, master: str) -> dict[str, str]:
    interface = interface_to(master)
    chosen = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return {**chosen, **os.environ} | {
        "PYTHONPATH": os.pathsep.join(_import_path(job.import_path)),
        "OMP_NUM_THREADS": str(job.threads),
        "SPARKTRAIN_GENERATION": str(job.generation),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # torchrun's listens everywhere; ranks have their own (world.py)
        "SPARKTRAIN_TASK": str(os.getpid()),
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": f"[rank ${{rank}} {socket.gethostname()}] ",
    }


def _import_path(driver_path: tuple[str, ...]) -> list[str]:
    """This worker's import path, which has Spark's py-files, then what the driver has besides and exists here."""
    mine = [path for path in sys.path if path]
    return mine + [path for path in driver_path if path not in mine and os.path.exists(path)]


def _pump(child: subprocess.Popen[bytes], prefix: str, client: Any) -> list[str]:
    """Hand on each line until the ranks close their output; returns the last lines. A lost log connection costs the
    lines, never the run: stock TorchDistributor aborts the stage when its log server goes away."""
    tails: dict[str, collections.deque[str]] = {}  # one each: a rank's traceback must not push out another's last words
    assert child.stdout is not None
    for raw in child.stdout:
        line = prefix + raw.decode(errors="replace").rstrip()
        source = line.partition("]")[0] if line.startswith("[rank ") else ""
        tails.setdefault(source, collections.deque(maxlen=_TAIL_LINES)).append(line)
        if not line.startswith("[rank "):
            continue  # torchrun's own words: kept for the post-mortem, noise otherwise
        with suppress(Exception):
            if client is None:
                print(line, file=sys.stderr, flush=True)
            else:
                client.send(line)
    return [line for tail in tails.values() for line in tail]


def _work_dir(job: Job) -> str:
    """A directory on this machine's disk for what torchrun and ranks leave, where the run's is in an object store;
    empty where it is not. Spark removes what a task that it kills leaves there."""
    if "://" not in job.run_dir:
        return ""
    sys.path[:] = _import_path(job.import_path)
    spark_dir = os.environ.get("SPARK_LOCAL_DIRS", "").partition(",")[0]
    return tempfile.mkdtemp(prefix="sparktrain-", dir=spark_dir or None)


def _upload(work: str, uri: str) -> None:
    """Bring a task's logs to the run's. Those of a task that Spark kills are lost; the driver has had their lines."""
    from sparktrain.storage import place, room

    with suppress(OSError), room(place(uri)) as here:
        shutil.copytree(os.path.join(work, "logs"), here, dirs_exist_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _write_exit(job: Job, node: int, status: int, tail: list[str]) -> None:
    sys.path[:] = _import_path(job.import_path)
    from sparktrain.redaction import hidden
    from sparktrain.rundir import RunDir

    where = {"node": node, "host": socket.gethostname(), "launcher": job.launcher}
    exit_ = where | {"status": status, "tail": [hidden(line) for line in tail]}
    RunDir(job.run_dir).write_exit(job.generation, exit_)


def probe(
    config_json: str, run_dir: str, paths: tuple[str, ...], import_path: tuple[str, ...], node: int, looks: bool
) -> dict[str, Any]:
    """What one executor looks like to a run; one that ``looks`` also tries out the model (``worker --describe``).

    ``problem`` is an error line with its exit code ``code``, where the model or a path cannot be used.
    """
    report: dict[str, Any] = {"node": node, "host": socket.gethostname(), "python": platform.python_version()}
    sys.path[:] = _import_path(import_path)
    report["packages"] = {name: _version(name) for name in _PACKAGES}
    report["unreadable"] = [path for path in paths if not os.access(path, os.R_OK)]
    try:
        from sparktrain.storage import place

        (place(run_dir) / f".probe-{node}").write_text(str(time.time()))
        report["unwritable"] = ""
    except OSError as error:
        report["unwritable"] = str(error.strerror or error)
    if looks:
        asked = subprocess.run(
            [sys.executable, "-m", "sparktrain.worker", "--describe"],
            input=config_json,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode == 0:
            report["model"] = json.loads(asked.stdout.splitlines()[-1])
        else:
            lines = asked.stderr.strip().splitlines() or [f"it ended with status {asked.returncode}"]
            report |= {"problem": lines[-1].removeprefix("error: "), "code": asked.returncode}
    return report


def probe_partition(
    batches: Iterator[Any], config_json: str, run_dir: str, paths: tuple[str, ...], import_path: tuple[str, ...]
) -> Iterator[Any]:
    """:func:`probe` as a barrier task of ``mapInArrow``: one row with one JSON ``report``."""
    import pyarrow as pa
    from pyspark import BarrierTaskContext

    for _ in batches:
        pass
    context = BarrierTaskContext.get()
    hosts, node = [info.address.rpartition(":")[0] for info in context.getTaskInfos()], context.partitionId()
    report = probe(config_json, run_dir, paths, import_path, node, looks=hosts.index(hosts[node]) == node)
    yield pa.RecordBatch.from_pydict({"report": [json.dumps(report)]})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # not installed, but perhaps shipped by --py-files
        if importlib.util.find_spec(package) is None:
            return "missing"
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))
