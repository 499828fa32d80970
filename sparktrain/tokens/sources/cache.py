"""Shards of elsewhere on this machine's disk: whole shards, named by the sha256 of their content.

Whole shards and not blocks, because the hash that a manifest binds is the shard's, and because a shuffled plan comes
to every part of every shard anyway: long sequential fetches are what stores are good at. Data that is larger than the
cache is better read by ranges, without it. What an entry is, and how it is verified on each read, is ``entry.py``.

Processes share a directory. Who fetches holds an exclusive lock on ``fetching-HASH``, which becomes ``HASH`` by
rename; others wait for it. Who reads holds a shared lock on ``HASH``; eviction takes the least recently used entry
whose lock it gets at once. A process that dies lets go of its locks, so nothing is left to be cleaned up by hand.
"""

import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from sparktrain.errors import DataError
from sparktrain.tokens.source import Opener
from sparktrain.tokens.sources.entry import Entry, copy, entry_size, open_entry

# How often a shard that turns out to be damaged, or is gone as soon as it came, is fetched for one read.
_FETCHES = 2


class Cache:
    """At most ``max_bytes`` of shards in ``directory``, which is made if it is not there."""

    def __init__(self, directory: Path, max_bytes: int, opener: Opener) -> None:
        """``opener`` opens what is not here yet. Raises :class:`DataError` for a directory that is not ours alone."""
        self.directory, self.max_bytes, self._opener = directory, max_bytes, opener
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            status = directory.stat()
        except OSError as error:
            raise DataError(f"cache directory {directory} cannot be made: {error.strerror}; choose another") from error
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise DataError(f"cache directory {directory} can be written by others: choose one that is yours alone")

    def open(self, uri: str, size: int, sha256: str) -> "CachedSource":
        """The shard at ``uri``, of ``size`` bytes with hash ``sha256``, from here; fetched if it is not here.

        Raises :class:`DataError` where ``uri`` holds something else, and where there is no room: too large, or all
        that is here is in use.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise DataError(f"shard {uri} has the sha256 {sha256!r}, expected 64 lower-case hexadecimal digits")
        return CachedSource(self, uri, size, sha256)

    def attach(self, uri: str, size: int, sha256: str) -> Entry:
        """The entry, locked against eviction; fetched if it is not here or is damaged."""
        path = self.directory / sha256
        fetches = 0
        while True:
            descriptor = _open(path, os.O_RDONLY)
            if descriptor is None:
                # An entry that is fetched, and damaged or evicted before it is locked, again and again: a bad disk.
                if fetches == _FETCHES:
                    raise DataError(f"shard {uri} does not stay in the cache {self.directory}: check that disk")
                fetches += self._fetch(uri, size, sha256)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is(descriptor, path):
                entry = open_entry(descriptor, size)
                if entry is not None:
                    os.utime(descriptor)
                    return entry
                self.discard(descriptor, sha256)
            os.close(descriptor)

    def discard(self, descriptor: int, sha256: str) -> None:
        """Remove the entry that is open as ``descriptor``, unless it was replaced already; who reads it goes on."""
        with self._alone():
            if _is(descriptor, self.directory / sha256):
                (self.directory / sha256).unlink()

    def _fetch(self, uri: str, size: int, sha256: str) -> bool:
        """Bring the entry in; False where another process did while this one waited for it."""
        fetching, path = self.directory / f"fetching-{sha256}", self.directory / sha256
        descriptor = _open(fetching, os.O_RDWR | os.O_CREAT)
        assert descriptor is not None, "it was created"
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists() or not _is(descriptor, fetching):
                return False
            with self._alone():
                self._make_room(uri, entry_size(size))
                # Its full size from the start: that is what others see when they make room.
                os.ftruncate(descriptor, entry_size(size))
            self._copy(descriptor, uri, size, sha256)
            os.rename(fetching, path)
            return True
        except OSError as error:
            raise DataError(f"cache {self.directory} cannot take shard {uri}: {error.strerror}") from error
        finally:
            if _is(descriptor, fetching):  # it failed, or there was nothing to do
                fetching.unlink()
            os.close(descriptor)

    def _copy(self, descriptor: int, uri: str, size: int, sha256: str) -> None:
        for _ in range(_FETCHES):  # a second time for bytes that were damaged on the way
            source = self._opener(uri)
            if source is None:
                raise DataError(f"{uri} does not exist: restore it or take it out of the data")
            try:
                found = copy(source, descriptor, size)
            finally:
                source.close()
            if found == sha256:
                return
        raise DataError(
            f"shard {uri} has sha256 {found}, its manifest says {sha256} (fetched {_FETCHES} times): "
            "it was changed or damaged; restore it or make the manifest again"
        )

    def _make_room(self, uri: str, needed: int) -> None:
        """Evict until ``needed`` bytes fit. Called alone."""
        entries = []
        for entry in os.scandir(self.directory):
            with suppress(FileNotFoundError):  # a fetch that failed just now
                status = entry.stat(follow_symlinks=False)
                # What a dead process was fetching goes first.
                whole = not entry.name.startswith("fetching-")
                if entry.name != "lock":
                    entries.append((whole, status.st_mtime_ns, entry.path, status.st_size))
        used = sum(entry[3] for entry in entries)
        for _, _, path, size in sorted(entries):
            if used + needed <= self.max_bytes:
                return
            if needed <= self.max_bytes and _evict(Path(path)):
                used -= size
        if used + needed > self.max_bytes:
            raise DataError(
                f"shard {uri} needs {needed} bytes of the cache {self.directory}, which may hold {self.max_bytes} "
                f"and has {used} in use: let it be larger or do without it"
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """While what the directory holds is counted or taken away. Nobody waits for a shard meanwhile."""
        descriptor = _open(self.directory / "lock", os.O_RDWR | os.O_CREAT)
        assert descriptor is not None, "it was created"
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class CachedSource:
    """See :class:`sparktrain.tokens.source.Source`. The entry stays while this is open."""

    def __init__(self, cache: Cache, uri: str, size: int, sha256: str) -> None:
        self.uri = uri
        self._cache, self._size, self._sha256 = cache, size, sha256
        self._entry = cache.attach(uri, size, sha256)
        self._replaced: list[int] = []
        self._lock = Lock()

    @property
    def descriptor(self) -> int:
        return self._entry.descriptor

    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self._size:
            raise DataError(f"shard {self.uri} has {self._size} bytes, expected at least {offset + length}")
        for _ in range(_FETCHES):
            entry = self._entry
            raw = entry.read(offset, length)
            if raw is not None:
                return raw
            self._replace(entry)
        raise DataError(f"shard {self.uri} is damaged again in the cache {self._cache.directory}: check that disk")

    def close(self) -> None:
        for descriptor in (self._entry.descriptor, *self._replaced):
            os.close(descriptor)

    def _replace(self, damaged: Entry) -> None:
        with self._lock:
            if self._entry is damaged:
                self._cache.discard(damaged.descriptor, self._sha256)
                # Closed with the rest: another thread may be reading from it.
                self._replaced.append(damaged.descriptor)
                self._entry = self._cache.attach(self.uri, self._size, self._sha256)


def _open(path: Path, flags: int) -> int | None:
    """Never what a link points to; None where there is nothing."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cache entry {path} cannot be opened: {error.strerror}; remove it") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"cache entry {path} is no file: remove it")
    return descriptor


def _is(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still the file that is open as ``descriptor``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _evict(path: Path) -> bool:
    """Remove ``path`` unless it is in use, by this process or another."""
    descriptor = _open(path, os.O_RDWR)
    if descriptor is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is(descriptor, path):
            path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
