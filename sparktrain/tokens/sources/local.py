"""A file of this machine, or of a file system mounted on it.

Read with ``pread``: a file that is truncated under us is an error, where a memory map is a SIGBUS.
"""

import os
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

from sparktrain.errors import DataError


class LocalSource:
    """See :class:`sparktrain.tokens.source.Source`."""

    def __init__(self, uri: str) -> None:
        """Raises FileNotFoundError where there is nothing, :class:`DataError` where it may not be read."""
        self.uri = uri
        try:
            # Not to wait for the writer of a pipe, which has no effect on files.
            self.descriptor = os.open(_path(uri), os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError as error:
            allow = "; let the user that driver and executors run as read it" * isinstance(error, PermissionError)
            raise DataError(f"shard {uri} cannot be read: {error.strerror}{allow}") from error
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            os.close(self.descriptor)
            raise DataError(f"shard {uri} cannot be read: it is no regular file")

    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        try:
            raw = os.pread(self.descriptor, length, offset)
        except OSError as error:
            raise DataError(f"shard {self.uri} cannot be read: {error.strerror}; check its disk") from None
        if len(raw) != length:
            end = min(offset + len(raw), self.size())
            raise DataError(
                f"shard {self.uri} ends at byte {end}, expected at least {offset + length}: "
                "it was truncated after the plan was made; restore it"
            )
        return raw

    def close(self) -> None:
        os.close(self.descriptor)


def open_if_there(uri: str) -> LocalSource | None:
    """See :data:`sparktrain.tokens.source.Opener`."""
    try:
        return LocalSource(uri)
    except FileNotFoundError:
        return None


def files_in(uri: str) -> list[str] | None:
    """See :data:`sparktrain.tokens.source.Lister`; as absolute paths."""
    try:
        # Entries by their own names: a link in a cache leads to a file named by its hash, with no side files beside it.
        return [str(path) for path in Path(_path(uri)).resolve().iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"data directory {uri} cannot be listed: {error.strerror}") from error


def absolute(path: str) -> str:
    """As ``files_in`` would give it."""
    found = Path(path)
    return str(found.resolve() if found.is_dir() else found.parent.resolve() / found.name)


def _path(uri: str) -> str:
    return unquote(urlsplit(uri).path) if uri.startswith("file://") else uri
