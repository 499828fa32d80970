"""Sources of shards by URI scheme: a new kind of source is one file beside this one and one row here."""

from urllib.parse import urlsplit

from sparktrain.errors import DataError
from sparktrain.tokens.source import Opener, Source
from sparktrain.tokens.sources import local

__all__ = ["SOURCES", "open_if_there", "open_source"]

SOURCES: dict[str, Opener] = {
    "": local.open_if_there,
    "file": local.open_if_there,
}


def open_source(uri: str) -> Source:
    """The source at ``uri``. Raises :class:`DataError` where there is none."""
    source = open_if_there(uri)
    if source is None:
        raise DataError(f"{uri} does not exist: restore it or take it out of the data")
    return source


def open_if_there(uri: str) -> Source | None:
    """The source at ``uri``, chosen by its scheme; a plain path is local. Raises :class:`DataError` for others."""
    scheme = urlsplit(uri).scheme
    if scheme not in SOURCES:
        known = ", ".join(f"{name}://" for name in SOURCES if name)
        raise DataError(f"{uri} has the scheme {scheme}://, which is unknown: use a path or {known}")
    return SOURCES[scheme](uri)
