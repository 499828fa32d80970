"""How the shards of a run are reached: at their places, at mirrors of these, through a cache on this machine."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Protocol

from sparktrain.errors import DataError
from sparktrain.tokens import sources
from sparktrain.tokens.shard import Shard
from sparktrain.tokens.source import Opener, Source
from sparktrain.tokens.sources.cache import Cache
from sparktrain.tokens.sources.manifest import UNKNOWN, Known, promised, promised_by_name
from sparktrain.tokens.sources.mirrors import Mirrors


class Reach(Protocol):
    """The settings; :class:`sparktrain.config.Data` has them."""

    @property
    def mirrors(self) -> tuple[str, ...]:
        """Roots that hold the same files."""

    @property
    def cache_dir(self) -> Path | None:
        """None: no cache."""

    @property
    def cache_bytes(self) -> int:
        """What it may hold."""


def opener(reach: Reach, known: Mapping[str, Known]) -> Opener:
    """Opens a URI as ``reach`` says. Shards of elsewhere whose hash is ``known`` come through the cache; side files,
    small and without a hash, do not. One opener per process: it remembers which mirror answers."""
    beyond = _mirrored(reach.mirrors)
    if reach.cache_dir is None:
        return beyond
    cache = Cache(reach.cache_dir, reach.cache_bytes, beyond)

    def open_if_there(uri: str) -> Source | None:
        shard = known.get(uri, UNKNOWN)
        return beyond(uri) if sources.is_local(uri) or not shard.sha256 else cache.open(uri, *shard)

    return open_if_there


def known(shards: Iterable[Shard]) -> dict[str, Known]:
    """What ``shards`` must be, by URI."""
    return {shard.path: Known(shard.num_bytes, shard.sha256) for shard in shards}


def locate(places: Iterable[str], suffixes: Collection[str], opener: Opener) -> list[tuple[str, Known]]:
    """The shards at ``places`` (:func:`sparktrain.tokens.sources.find`), with what a manifest says of each; a server
    that lists nothing is asked for its manifest. In no order.

    Raises :class:`DataError` where a manifest promises what is not there.
    """
    found: list[tuple[str, Known]] = []
    for place in places:
        by_name = PurePosixPath(place).suffix in suffixes
        if not (by_name or sources.listable(place)) and (listed := promised(place, opener)):
            found += listed.items()
            continue
        uris = sources.find(place, suffixes)
        directories = {uri.rpartition("/")[0] for uri in uris}
        look = promised_by_name if by_name else promised
        told = {uri: one for directory in sorted(directories) for uri, one in look(directory, opener).items()}
        if not by_name and (missing := sorted(told.keys() - set(uris))):
            raise DataError(f"shard {missing[0]} is missing, yet its manifest.json knows it: restore it")
        found += [(uri, told.get(uri, UNKNOWN)) for uri in uris]
    return found


def _mirrored(roots: tuple[str, ...]) -> Opener:
    """Opens a URI under one of ``roots`` there or, where that fails, under the others; any other URI as it is."""
    prefixes = [f"{root.rstrip('/')}/" for root in roots]
    mirrors = {
        prefix: Mirrors([prefix, *(other for other in prefixes if other != prefix)], sources.open_if_there)
        for prefix in prefixes
    }

    def open_if_there(uri: str) -> Source | None:
        own = next((prefix for prefix in prefixes if uri.startswith(prefix)), None)
        return mirrors[own].open_if_there(uri) if own else sources.open_if_there(uri)

    return open_if_there
