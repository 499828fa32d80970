"""Sources of shards by URI scheme: a new kind of source is one file beside this one and one row here.

::

    data/train  file:///data/train          a directory or one file of this machine
    https://host/x-{00000..00012}.ds        one file or a numbered template (listing.py); servers list nothing
    hf://datasets/OWNER/NAME[@REVISION]/en  a directory or one file of a dataset repository of the Hub
    s3://bucket/en  gs://...  abfs://...    the same of any store that fsspec has a driver for
"""

import re
from collections.abc import Collection
from hashlib import sha256
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

from sparktrain.errors import DataError
from sparktrain.tokens.source import Lister, Opener, Source
from sparktrain.tokens.sources import filesystem, hf, http, local
from sparktrain.tokens.sources.listing import expand

__all__ = ["SOURCES", "Kind", "absolute", "find", "is_local", "listable", "open_if_there", "open_source"]
__all__ += ["sha256_of"]

# Bytes hashed in one piece.
_HASHED = 8 << 20


class Kind(NamedTuple):
    """A kind of source. ``files_in`` is None where directories cannot be listed."""

    open_if_there: Opener
    files_in: Lister | None


SOURCES: dict[str, Kind] = {
    "": Kind(local.open_if_there, local.files_in),
    "file": Kind(local.open_if_there, local.files_in),
    "http": Kind(http.open_if_there, None),
    "https": Kind(http.open_if_there, None),
    "hf": Kind(hf.open_if_there, hf.files_in),
}
_FILESYSTEM = Kind(filesystem.open_if_there, filesystem.files_in)


def open_source(uri: str, opener: Opener | None = None) -> Source:
    """The source at ``uri``. Raises :class:`DataError` where there is none."""
    source = (opener or open_if_there)(uri)
    if source is None:
        raise DataError(f"{uri} does not exist: restore it or take it out of the data")
    return source


def sha256_of(uri: str, num_bytes: int, opener: Opener) -> str:
    """Hex digest of the ``num_bytes`` at ``uri``, in bounded memory."""
    source, hashed = open_source(uri, opener), sha256()
    for offset in range(0, num_bytes, _HASHED):
        hashed.update(source.read(offset, min(_HASHED, num_bytes - offset)))
    source.close()
    return hashed.hexdigest()


def open_if_there(uri: str) -> Source | None:
    """The source at ``uri``, chosen by its scheme; a plain path is local. Raises :class:`DataError` for others."""
    return _kind(uri).open_if_there(uri)


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a file of this machine, or of a file system mounted on it."""
    return _kind(uri) is SOURCES[""] or uri.startswith("file://")


def listable(where: str) -> bool:
    """Whether a directory at ``where`` can be listed."""
    return _kind(where).files_in is not None


def absolute(where: str) -> str:
    """``where`` for other processes: a plain path absolute and without links, as :func:`find` gives it; a URI as it
    is. Raises :class:`DataError` for a URI of no kind that is known."""
    return local.absolute(where) if _kind(where) is SOURCES[""] else where


def find(where: str, suffixes: Collection[str]) -> list[str]:
    """URIs of the files at ``where`` with one of ``suffixes``, in no order; absolute paths where they are local.

    ``where`` is a directory, a file, or, unless it is a plain path, a template (:func:`listing.expand`). Files that
    are named one by one, by template or alone, are not looked for here: opening them is.
    """
    kind, patterns = _kind(where), "/".join(f"*{suffix}" for suffix in suffixes)
    is_path = not urlsplit(where).scheme
    expanded = [where] if is_path else expand(where)
    listed = kind.files_in(where) if kind.files_in and expanded == [where] else None
    if listed is None:
        if all(PurePosixPath(uri).suffix in suffixes for uri in expanded) and (not is_path or open_if_there(where)):
            return [local.absolute(where)] if is_path else expanded
        if kind.files_in is None:
            raise DataError(f"{where} cannot be listed: give {patterns} files, one by one or as x-{{000..012}}")
        raise DataError(f"data directory {where} does not exist: give a directory with {patterns} shards")
    found = [file for file in listed if PurePosixPath(file).suffix in suffixes]
    if not found:
        raise DataError(f"data directory {where} holds no {patterns} shards: make some with jobs/tokenize.py")
    return found


def _kind(uri: str) -> Kind:
    scheme, _, rest = uri.partition("://")
    if not rest:
        return SOURCES[""]
    user = rest.partition("/")[0].rpartition("@")[0]
    if ":" in user or (user and scheme in ("http", "https")):
        raise DataError(f"a {scheme}:// address is given with a password: it would end up in the plan and in logs")
    if re.search(r"\?[\w.~%-]+=", rest):
        raise DataError(
            f"{scheme}://{rest.partition('?')[0]} is given with a query, often a signature: it would end up in "
            "the plan and in logs; give the address alone, and what proves who you are in the environment"
        )
    if scheme in SOURCES:
        return SOURCES[scheme]
    if not filesystem.known(scheme):
        names = ", ".join(f"{name}://" for name in SOURCES if name)
        raise DataError(f"{uri} has the scheme {scheme}://, which is unknown: use a path, {names} or one of fsspec's")
    return _FILESYSTEM
