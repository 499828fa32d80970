"""A command that ends: by itself, by its time-out, or with the process that started it; and all it started with it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sparktrain import heartbeat
from sparktrain.errors import ConfigError, LaunchError

_GRACE_SECONDS = 2.0
_BEAT_SECONDS = 1.0
_TAIL_BYTES = 4000

# A rank may be killed at any moment, and a parent-death signal reaches its children but not theirs. This process holds
# one end of a pipe; when the rank is gone the other end closes, and it kills the command's whole process group. It is
# also why no code runs between fork and exec here: in a process with gloo's threads, that may deadlock.
_SENTRY = "import os, sys; group = int(sys.stdin.readline()); sys.stdin.read(); os.killpg(group, 9)"

# What would make the command join our own process group of ranks.
_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SPARKTRAIN_GENERATION")
_OUR_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_")


def run(argv: Sequence[str], environment: Mapping[str, str], timeout: float, errors: Path, name: str) -> None:
    """Run ``argv`` in a process group of its own until it ends; its stdout is ours, its stderr goes to ``errors``.

    Raises :class:`ConfigError` where the program is not found, and :class:`LaunchError` where it ends with another
    status than 0 or not within ``timeout`` seconds, with its last line; ``name`` says which command of ours it is.
    """
    program = shutil.which(argv[0], path=environment.get("PATH"))
    if program is None:
        raise ConfigError(f"{name}: program {argv[0]!r} was not found: give its path, or one on this machine's PATH")
    with errors.open("wb") as stderr:
        try:
            child = subprocess.Popen(
                [program, *argv[1:]],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"{name}: {program} cannot be run: {error.strerror}; make it executable") from None
    try:
        with _guarded(child.pid):
            _wait(child, timeout)
            status = child.poll()
            _stop(child)  # while guarded: it may take the grace
    finally:
        _stop(child)
    if status == 0:
        return
    tail = _tail(errors)
    sys.stderr.write(tail)  # the file is about to go, and the rank's log is where one looks
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    said = f": {lines[-1][-500:]}" if lines else ", without a word on stderr"
    if status is None:
        raise LaunchError(f"{name} did not end within {timeout:g} s and was killed{said}; raise its timeout or mend it")
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    raise LaunchError(f"{name} {how}{said}")


def environment_of(roots: Sequence[str], more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for a command: without what makes a rank of it, with ``roots`` first on Python's
    path, and ``more`` over all."""
    kept = {k: v for k, v in os.environ.items() if k not in _OURS and not k.startswith(_OUR_PREFIXES)}
    path = os.pathsep.join([*roots, *filter(None, [kept.get("PYTHONPATH")])])
    return kept | ({"PYTHONPATH": path} if path else {}) | dict(more)


def search_path() -> str:
    """PATH for a command: "python" is the one that this process runs in."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def own_device(index: int) -> dict[str, str]:
    """What makes GPU ``index`` of this process the only one of a command: its number 0."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[index] if visible else str(index)}


@contextmanager
def _guarded(group: int) -> Iterator[None]:
    """While this holds, the process group ends with this process, however that ends."""
    sentry = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SENTRY],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert sentry.stdin is not None
    try:
        sentry.stdin.write(f"{group}\n".encode())
        sentry.stdin.flush()
        yield
    finally:
        sentry.kill()
        sentry.wait()
        sentry.stdin.close()


def _wait(child: subprocess.Popen[bytes], timeout: float) -> None:
    """Until the command ends, or its time is up. This rank does not hang meanwhile, and says so."""
    deadline = time.monotonic() + timeout
    while child.poll() is None and (left := deadline - time.monotonic()) > 0:
        heartbeat.at("computes")
        with suppress(subprocess.TimeoutExpired):
            child.wait(min(left, _BEAT_SECONDS))


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End the command, by SIGTERM and after a grace by SIGKILL, and whatever it left running in its group."""
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_SECONDS)
    with suppress(ProcessLookupError, PermissionError):  # macOS says the latter of a group of zombies
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _tail(file: Path) -> str:
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        return opened.read().decode(errors="replace")
