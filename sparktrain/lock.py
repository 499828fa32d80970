"""One writer: a file that names who holds a directory, made by an exclusive create.

Its holder renews it every few seconds. The lock of a process that is gone from this machine is taken over at once; that
of any other when it was not renewed for a minute, by the clock of the file system or store that it is on: nobody here
can look at another machine's, and a process that has the same number here may be another. A holder that was cut off and
comes back sees that and ends its run: ``Held``.

A file is renewed by its time; where that cannot be set, and an object, by another one beside it, ``LOCK.<token>.beat``,
which only its holder writes: so nobody ever writes over another's lock.
"""

import contextlib
import datetime
import itertools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparktrain import storage
from sparktrain.beside import beside
from sparktrain.errors import ConfigError, RunDirBusy, Superseded

RENEWED_SECONDS, STALE_SECONDS = 10.0, 60.0
_ATTEMPTS = 40

Owner = dict[str, Any]


class Held:
    """The lock ``file`` of ``what``, as long as it is ``owner``'s; ``tell`` is called once when it is not any more."""

    def __init__(self, file: Path, what: str, owner: Owner, tell: Callable[[str], None]) -> None:
        self._file, self._what, self._owner, self._tell = file, what, owner, tell
        self._lost = ""

    def check(self) -> None:
        """Raises :class:`Superseded` where somebody else has taken the lock."""
        self.renew()
        if self._lost:
            raise Superseded(self._lost)

    def renew(self) -> None:
        """Say that the holder lives, and see whether it is one still; a store that is away is asked again later."""
        if self._lost:
            return
        with contextlib.suppress(OSError):
            holder = _read_lock(self._file)
            if holder is None:  # removed by hand, or just being looked at by who found it old
                with contextlib.suppress(ConfigError):
                    _create(self._file, json.dumps(self._owner))
            elif holder.get("token") == self._owner["token"]:
                _renew(self._file, self._owner)
            else:
                self._lost = (
                    f"{self._what} was taken over by process {holder['pid']} on {holder['host']}, as this process had "
                    f"not renewed its lock for {STALE_SECONDS:.0f} s: this attempt ends"
                )
                self._tell(self._lost)

    def keep(self, over: threading.Event) -> None:
        """Renew until it is over."""
        while not over.wait(RENEWED_SECONDS):
            self.renew()

    def release(self) -> None:
        """Remove the lock, where it is ours."""
        with contextlib.suppress(OSError):
            if (_read_lock(self._file) or {}).get("token") == self._owner["token"]:
                self._file.unlink(missing_ok=True)
            _beat(self._file, self._owner).unlink(missing_ok=True)


@contextlib.contextmanager
def hold(file: Path, what: str, tell: Callable[[str], None] = lambda why: None) -> Iterator[Held]:
    """Hold ``file`` while inside; raises :class:`RunDirBusy`, naming ``what`` and who holds it since when. ``tell``
    hears, from another thread, that somebody else has taken it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": now, "token": uuid.uuid4().hex}
    for attempt in itertools.count():
        try:
            _create(file, json.dumps(owner))
            break
        except FileExistsError:
            holder = _read_lock(file)
        if holder is None and attempt < _ATTEMPTS:  # just being written, or just removed
            time.sleep(0.05)
        elif holder is None:
            raise RunDirBusy(
                f"{what} is in use by process unknown on an unknown host since an unknown time: "
                f"wait for it or choose another; if that process is gone, remove {file}"
            )
        else:
            silent = _check_gone(file, what, holder, owner)
            if _bury(file, holder) and silent:
                since = f"which has not renewed its lock for {silent:.0f} s"
                print(f"{what} was in use by {_who(holder)}, {since}: taken over", flush=True)
    held = Held(file, what, owner, tell)
    if not storage.is_local(file):
        _check_refused(file, owner)
    try:
        with beside("lock", held.keep):
            yield held
    finally:
        held.release()


def _check_refused(file: Path, owner: Owner) -> None:
    """Raises :class:`ConfigError` where the store, or a driver too old, writes over what is there."""
    with contextlib.suppress(FileExistsError):
        _create(file, json.dumps(owner | {"twice": True}))
        file.unlink(missing_ok=True)
        raise ConfigError(f"{file.parent} is in a store, or reached by a driver, that writes over what must not be: no "
                          "run directory can be locked there; update the driver, or give a directory")  # fmt: skip


def _who(holder: Owner) -> str:
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


def _check_gone(file: Path, what: str, holder: Owner, owner: Owner) -> float:
    """Raises :class:`RunDirBusy` where ``holder`` may live; for how long one of another machine has been silent."""
    who = _who(holder)
    if holder["host"] == owner["host"] and not _alive(int(holder["pid"])):
        return 0.0
    try:
        silent = _silent_seconds(file, holder)
    except FileNotFoundError:  # just released
        return 0.0
    if silent < STALE_SECONDS:
        raise RunDirBusy(
            f"{what} is in use by {who}, which renewed its lock {max(0.0, silent):.0f} s ago: wait for it or choose "
            f"another; one that is gone is taken over after {STALE_SECONDS:.0f} s"
        )
    return silent


def _create(file: Path, content: str) -> None:
    """Make ``file`` whole or not at all; ``FileExistsError``: it is there."""
    try:
        storage.create(file, content.encode())
    except FileExistsError:
        raise
    except OSError as error:
        mend = "make room" if storage.is_local(file) else "check its bucket, address and credentials"
        raise ConfigError(f"{file} cannot be written: {error.strerror}; {mend} or choose another directory") from None


def _read_lock(file: Path) -> Owner | None:
    """Who holds a lock; None where that cannot be read (yet, or any more)."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys()
    return holder if known and isinstance(holder["pid"], int) and 0 < holder["pid"] < 2**31 else None


def _beat(file: Path, owner: Owner) -> Path:
    return file.with_name(f"{file.name}.{owner.get('token', '')}.beat")


def _renew(file: Path, owner: Owner) -> None:
    if storage.is_local(file):
        with contextlib.suppress(OSError):  # a mounted store may know no times but of what is written
            os.utime(file)
            return
    _beat(file, owner).write_bytes(b"")


def _silent_seconds(file: Path, holder: Owner) -> float:
    """For how long a holder has not renewed its lock."""
    times = [file.stat().st_mtime]
    with contextlib.suppress(FileNotFoundError):
        times.append(_beat(file, holder).stat().st_mtime)
    return storage.clock(file.parent) - max(times)


def _bury(file: Path, holder: Owner) -> bool:
    """Remove the lock of a process that is gone; not one that took its place meanwhile. Of those who found it old, the
    one that makes the claim does, if it is there still."""
    claim = file.with_name(f".{file.name}.{holder.get('token', '')}.tmp")
    try:
        storage.create(claim, uuid.uuid4().hex.encode())
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if storage.clock(file.parent) - claim.stat().st_mtime > STALE_SECONDS:  # who made it is gone, too
                claim.unlink(missing_ok=True)
        time.sleep(0.2)
        return False
    except FileNotFoundError:  # the directory is gone, with the lock
        return False
    try:
        if found := _read_lock(file) == holder:
            file.unlink(missing_ok=True)
            _beat(file, holder).unlink(missing_ok=True)
        return found
    finally:
        claim.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0
