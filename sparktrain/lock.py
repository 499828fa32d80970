"""One writer: a file that names who holds a directory, made by an exclusive create.

The lock of a process that is gone from this machine is taken over; that of another machine's is not: nobody here can
tell whether it still runs.
"""

import contextlib
import datetime
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparktrain.errors import ConfigError, RunDirBusy

_ATTEMPTS = 40


@contextlib.contextmanager
def hold(file: Path, what: str) -> Iterator[None]:
    """Hold ``file`` while inside; raises :class:`RunDirBusy`, naming ``what`` and who holds it since when."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
    for attempt in itertools.count():
        try:
            _create(file, json.dumps(owner))
            break
        except FileExistsError:
            holder = _read_lock(file)
        if holder is None and attempt < _ATTEMPTS:  # just being written, or just removed
            time.sleep(0.05)
        elif holder is None or holder["host"] != owner["host"] or _alive(int(holder["pid"])):
            who = holder or {"pid": "unknown", "host": "an unknown host", "since": "an unknown time"}
            raise RunDirBusy(
                f"{what} is in use by process {who['pid']} on {who['host']} since {who['since']}: "
                f"wait for it or choose another; if that process is gone, remove {file}"
            )
        else:
            _bury(file, holder)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def _create(file: Path, content: str) -> None:
    """Make ``file`` whole or not at all; ``FileExistsError``: it is there."""
    temporary = file.with_name(f".LOCK.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        try:
            os.link(temporary, file)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with open(file, "x", encoding="utf-8") as out:
                out.write(content)
    except FileExistsError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be written: {error.strerror}; make room or choose another directory"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def _read_lock(file: Path) -> dict[str, Any] | None:
    """Who holds a lock; None where that cannot be read (yet, or any more)."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys()
    return holder if known and isinstance(holder["pid"], int) and 0 < holder["pid"] < 2**31 else None


def _bury(file: Path, holder: dict[str, Any]) -> None:
    """Remove the lock of a process that is gone from this machine; not one that took its place meanwhile."""
    grave = file.with_name(f".LOCK.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(FileNotFoundError):
        file.rename(grave)
        if _read_lock(grave) != holder:
            grave.rename(file)
        grave.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
