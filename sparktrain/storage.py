"""Where a run directory is, and the few things that are done in one way on a disk and in another in an object store.

A directory is a :class:`pathlib.Path`. ``s3://bucket/runs/x`` is a ``Remote`` (``remote.py``), which has the same
methods as far as a run directory needs them, so that what is read and written by name is the same code for both.

A store has no directories, no renames and no links: an object is there whole or not at all, what is made exclusively is
a PUT that the store refuses where there is one, and a directory is the objects below a prefix.
"""

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Drivers that can make an object exclusively (pipe_file with mode="create"): without it a run directory could have two
# owners.
_DRIVERS = {"s3fs": ("s3", "s3a"), "gcsfs": ("gs", "gcs"), "adlfs": ("abfs", "abfss", "az")}
PACKAGES = {scheme: package for package, schemes in _DRIVERS.items() for scheme in schemes}


class Unusable(OSError, ValueError):
    """A place that no run directory can be at, in one line."""


def place(where: str | Path) -> Path:
    """``where`` for this process and others: a path, absolute, or an object store's prefix.

    Raises :class:`Unusable` for a URI of another kind, and where its driver is not installed.
    """
    if not isinstance(where, str) or "://" not in where:
        return Path(where).absolute() if isinstance(where, str | Path) else where
    scheme, _, rest = where.partition("://")
    if scheme not in PACKAGES:
        raise Unusable(
            f"{where} has the scheme {scheme}://, which cannot be locked: give s3://, gs://, abfs:// or a directory "
            "that driver and executors share"
        )
    bucket = rest.partition("/")[0]
    if not bucket or not rest.strip("/").partition("/")[2]:
        raise Unusable(f"{where} names no directory in a bucket: give {scheme}://BUCKET/DIRECTORY")
    if set("*[]") & set(rest):
        raise Unusable(f"{where} has one of *[], which drivers of stores take for a pattern: choose another name")
    if ":" in bucket.rpartition("@")[0] or "?" in rest:
        raise Unusable(
            f"the {scheme}:// address has a password or a query, which would end up in files and logs: give the "
            "address alone, and what proves who you are in the environment"
        )
    try:
        from sparktrain.remote import Remote

        found: Any = Remote.at(where)
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or PACKAGES[scheme]
        package = {"upath": "universal_pathlib"}.get(missing.partition(".")[0], PACKAGES[scheme])
        raise Unusable(f"{where} needs the Python package {package}: pip install {package} on all machines") from None
    return found  # type: ignore[no-any-return]


def is_local(path: Path) -> bool:
    """Whether ``path`` is on a file system of this machine."""
    return isinstance(path, Path)


def check_told(path: Path, error: Exception) -> None:
    """Raises ``error`` where it tells nothing about what is at ``path``: a store that could not be asked."""
    if not is_local(path) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise error


def size(path: Path) -> int | None:
    """Bytes of the file at ``path``; None: there is none. Raises OSError where that cannot be told."""
    try:
        return path.stat().st_size if not is_local(path) or path.is_file() else None
    except (FileNotFoundError, NotADirectoryError):
        return None


def entries(path: Path) -> dict[str, bool]:
    """Names in ``path``, and of each whether it is a directory; none where there is no such directory."""
    if not is_local(path):
        found: dict[str, bool] = path.entries()  # type: ignore[attr-defined]
        return found
    try:
        with os.scandir(path) as listed:
            return {entry.name: entry.is_dir() for entry in listed}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def create(path: Path, content: bytes) -> None:
    """Make ``path`` whole or not at all; ``FileExistsError``: it is there. Of several at once, one succeeds."""
    if not is_local(path):
        path.create(content)  # type: ignore[attr-defined]
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        try:
            os.link(temporary, path)
        except FileExistsError:
            if temporary.stat().st_nlink < 2:  # else it is ours: NFS asks again where an answer was lost
                raise
        except OSError:  # a file system without links
            with open(path, "xb") as out:
                out.write(content)
    finally:
        temporary.unlink(missing_ok=True)


def claim(directory: Path) -> None:
    """Make ``directory``; ``FileExistsError``: somebody did. Of several at once, one succeeds."""
    if is_local(directory):
        directory.mkdir(parents=True)
    else:
        create(directory / "begun", uuid.uuid4().hex.encode())


def clock(directory: Path) -> float:
    """The time by which files in ``directory`` have theirs: its server's, which need not be this machine's."""
    mark = directory / f".LOCK.{uuid.uuid4().hex}.tmp"
    try:
        mark.write_bytes(b"")
        return mark.stat().st_mtime
    finally:
        mark.unlink(missing_ok=True)


def copy(old: Path, new: Path) -> None:
    """What is at ``old`` at ``new``, too, without writing it again. Raises OSError where that cannot be."""
    if is_local(old):
        new.hardlink_to(old)
    else:
        old.copy_to(new)  # type: ignore[attr-defined]


def remove(directory: Path) -> None:
    """All of ``directory``, if it is there."""
    if is_local(directory):
        shutil.rmtree(directory, ignore_errors=True)
    else:
        directory.remove()  # type: ignore[attr-defined]


def discard(directory: Path) -> None:
    """:func:`remove` it so that nobody sees half of it: in a store, which cannot rename, ``DIRECTORY.gone`` beside it
    says meanwhile that it does not exist any more."""
    if is_local(directory):
        grave = directory.with_name(f".removed-{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            directory.rename(grave)
            remove(grave)
        return
    gone = directory.with_name(f"{directory.name}.gone")
    gone.touch()
    remove(directory)
    gone.unlink()


@contextlib.contextmanager
def room(directory: Path) -> Iterator[Path]:
    """A directory on this machine's disk to write files into; when it is left, they are in ``directory``, which may be
    the same. ``config.json`` comes last: a model without it is none."""
    if is_local(directory):
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="sparktrain-") as temporary:
        here = Path(temporary)
        yield here
        files = sorted((file for file in here.rglob("*") if file.is_file()), key=lambda f: f.name == "config.json")
        for file in files:
            (directory / file.relative_to(here).as_posix()).upload(file)  # type: ignore[attr-defined]


@contextlib.contextmanager
def at_hand(path: Path, *without: str) -> Iterator[Path]:
    """The file, or the files in the directory, at ``path``, on this machine's disk while inside; not those whose names
    begin with one of ``without``."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="sparktrain-") as temporary:
        here, inside = Path(temporary) / path.name, entries(path)
        if inside:
            here.mkdir()
        else:
            path.download(here)  # type: ignore[attr-defined]
        for name, is_directory in inside.items():
            if not is_directory and not name.startswith(without):
                (path / name).download(here / name)  # type: ignore[attr-defined]
        yield here


def dataset(directory: Path) -> dict[str, Any]:
    """Arguments of :func:`pyarrow.dataset.dataset` for the files in ``directory``."""
    if is_local(directory):
        return {"source": directory}
    remote: Any = directory
    return {"source": remote.path, "filesystem": remote.fs}
