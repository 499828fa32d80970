"""A path in an object store: ``upath``'s names, fsspec's drivers, and every error an OSError of one line.

Listings are never cached: others write here. Credentials and addresses are what the driver finds in the environment
(``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ...; ``FSSPEC_<SCHEME>_<ARGUMENT>`` for any argument of any driver), on
driver and executors alike; none is a setting, so that none is written down.
"""

import contextlib
import errno
import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upath import UPath
from upath.extensions import ProxyUPath

from sparktrain.redaction import hidden

# Read at a time where a file is read from its beginning to its end.
_BLOCK = 16 << 20


@contextlib.contextmanager
def _said(path: "Remote") -> Iterator[None]:
    """Drivers raise what they like, in as many lines."""
    try:
        yield
    except Exception as error:
        first = next(iter(str(getattr(error, "strerror", None) or error).splitlines()), "")
        text = hidden(first)[:300] or type(error).__name__
        kinds = (FileNotFoundError, FileExistsError, PermissionError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), OSError)
        number = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST, PermissionError: errno.EACCES}
        raise kind(number.get(kind, errno.EIO), text, str(path)) from None


class Remote(ProxyUPath):
    """What a run directory needs of :class:`pathlib.Path`, and what it is done with that differs (``storage.py``)."""

    @classmethod
    def at(cls, uri: str) -> "Remote":
        found = cls._from_upath(UPath(uri.rstrip("/"), use_listings_cache=False))
        found.fs  # noqa: B018  raises ImportError where the driver is not installed
        return found

    # -- as pathlib has it ---------------------------------------------------------------------------------------

    def absolute(self) -> "Remote":
        return self

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        with _said(self):
            return bool(self.fs.exists(self.path))

    def is_file(self) -> bool:
        with _said(self):
            return bool(self.fs.isfile(self.path))

    def is_dir(self) -> bool:
        return bool(self.entries())

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        with _said(self):
            info = self.fs.info(self.path)
            changed = self.fs.modified(self.path).timestamp() if info["type"] == "file" else 0.0
            return os.stat_result((0, 0, 0, 0, 0, 0, int(info["size"] or 0), int(changed), int(changed), int(changed)))

    def read_bytes(self) -> bytes:
        with _said(self):
            return bytes(self.fs.cat_file(self.path))

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: Any) -> int:
        with _said(self):
            self.fs.pipe_file(self.path, bytes(data))
        return len(data)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        assert mode == "rb", "other files are read and written whole"
        with _said(self):
            return self.fs.open(self.path, "rb", block_size=_BLOCK, cache_type="readahead")

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        self.write_bytes(b"")

    def unlink(self, missing_ok: bool = False) -> None:
        with _said(self), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a directory is what is in it; and drivers would make a bucket of it."""

    def rmdir(self, recursive: bool = False) -> None:
        """Nothing."""

    def iterdir(self) -> Iterator["Remote"]:
        yield from (self / name for name in self.entries())

    def glob(self, pattern: str, **options: Any) -> Iterator["Remote"]:
        assert "/" not in pattern
        yield from (self / name for name in sorted(self.entries()) if fnmatch.fnmatchcase(name, pattern))

    # -- as stores have it ---------------------------------------------------------------------------------------

    def entries(self) -> dict[str, bool]:
        """See :func:`sparktrain.storage.entries`."""
        with _said(self):
            try:
                listed = self.fs.ls(self.path, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            found = {str(entry["name"]).strip("/"): entry["type"] == "directory" for entry in listed}
            found.pop(self.path.strip("/"), None)  # the directory itself, which some programs make an object of
            return {name.rpartition("/")[2]: is_directory for name, is_directory in found.items()}

    def create(self, content: bytes) -> None:
        """See :func:`sparktrain.storage.create`."""
        try:
            with _said(self):
                self.fs.pipe_file(self.path, content, mode="create")
        except OSError as error:
            # Drivers ask again where an answer was lost: then it may be what we made ourselves that is in the way.
            try:
                found = self.read_bytes()
            except OSError:  # nothing, or gone again
                raise error from None
            if found != content:
                raise FileExistsError(errno.EEXIST, "it is there", str(self)) from None

    def copy_to(self, new: "Remote") -> None:
        with _said(self):
            self.fs.cp_file(self.path, new.path)

    def remove(self) -> None:
        with _said(self), contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.path, recursive=True)

    def upload(self, file: Path) -> None:
        with _said(self):
            self.fs.put_file(str(file), self.path)

    def download(self, file: Path) -> None:
        with _said(self):
            self.fs.get_file(self.path, str(file))
