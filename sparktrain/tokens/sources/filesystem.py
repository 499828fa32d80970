"""Files of any store that fsspec opens: s3, gs, abfs, hdfs, dbfs, ... Credentials are those that its driver finds
itself, in its own environment variables or files; ``FSSPEC_<SCHEME>_<ARGUMENT>`` sets any argument of any driver."""

from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from sparktrain.errors import DataError
from sparktrain.redaction import hidden
from sparktrain.tokens.sources.patience import Passing, Patience, persist

T = TypeVar("T")


class FilesystemSource:
    """See :class:`sparktrain.tokens.source.Source`."""

    descriptor = None

    def __init__(self, uri: str, patience: Patience) -> None:
        """Raises FileNotFoundError where there is nothing, or a directory."""
        self.uri = uri
        self._patience = patience
        self._store, self._path = _store(uri)
        info = _translated(uri, patience, lambda: self._store.info(self._path))
        if info["type"] != "file":
            raise FileNotFoundError(uri)
        if info.get("size") is None:
            raise DataError(f"{uri} is in a store that does not tell its size: copy it to another")
        self._size = int(info["size"])

    def size(self) -> int:
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        try:
            raw = _translated(
                self.uri, self._patience, lambda: self._store.cat_file(self._path, start=offset, end=offset + length)
            )
        except FileNotFoundError:
            raise DataError(f"{self.uri} was there and is gone: restore it or take it out of the data") from None
        if len(raw) != length:
            raise DataError(
                f"shard {self.uri} ends at byte {offset + len(raw)}, expected at least {offset + length}: "
                "it was truncated after the plan was made; restore it"
            )
        return bytes(raw)

    def close(self) -> None:
        """Nothing: fsspec keeps one connection per store and process."""


def open_if_there(uri: str, patience: Patience | None = None) -> FilesystemSource | None:
    """See :data:`sparktrain.tokens.source.Opener`."""
    try:
        return FilesystemSource(uri, patience or Patience(attempts=3))
    except FileNotFoundError:
        return None


def files_in(uri: str) -> list[str] | None:
    """See :data:`sparktrain.tokens.source.Lister`."""
    store, path = _store(uri)
    store.invalidate_cache()
    try:
        entries = _translated(uri, Patience(attempts=3), lambda: store.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return None
    names = [str(entry["name"]) for entry in entries if entry["type"] == "file"]
    if [name.strip("/") for name in names] == [path.strip("/")]:
        return None  # stores list a file as itself
    # Not the store's own full names: some leave out the account or the host that the user named.
    return [f"{uri.rstrip('/')}/{name.rpartition('/')[2]}" for name in names]


def known(scheme: str) -> bool:
    """Whether fsspec has a driver for ``scheme``, installed or not."""
    return scheme in fsspec.registry or scheme in fsspec.available_protocols()


def _store(uri: str) -> tuple[Any, str]:
    try:
        store, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or "of its driver"
        package = missing.partition(".")[0]
        raise DataError(
            f"{hidden(uri)} needs the Python package {package}: pip install {package} on driver and executors"
        ) from None
    except Exception as error:
        raise DataError(f"{hidden(uri)} cannot be opened: {_said(error)}") from None
    return store, str(path)


def _translated(uri: str, patience: Patience, attempt: Callable[[], T]) -> T:
    """What ``attempt`` returns. Drivers raise what they like: what is not plainly final is tried again."""

    def once() -> T:
        try:
            return attempt()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except IsADirectoryError:
            raise FileNotFoundError(uri) from None
        except PermissionError as error:
            raise DataError(
                f"{hidden(uri)} may not be read: {_said(error)}; give driver and executors credentials for it"
            ) from None
        except (NotImplementedError, TypeError, ValueError) as error:
            raise DataError(f"{hidden(uri)} cannot be read: {_said(error)}") from None
        except Exception as error:
            raise Passing(_said(error)) from None

    try:
        return persist(patience, once)
    except Passing as failure:
        raise DataError(
            f"{hidden(uri)} cannot be read: {failure} ({patience.attempts} attempts); check address and credentials"
        ) from None


def _said(error: Exception) -> str:
    """One line of ``error`` without secrets."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__} {hidden(first)}".strip()[:300]
