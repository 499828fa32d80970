"""The same files in several places: where one fails, the next is asked, and kept for as long as it answers."""

from collections.abc import Sequence
from threading import Lock

from sparktrain.errors import DataError
from sparktrain.tokens.source import Opener, Source


class Mirrors:
    """Places that hold the same files. ``open_if_there`` is an :data:`Opener`, to stand where a plain one does.

    Which place answered last is shared by all sources opened here, so that a place that is down costs its time-outs
    once and not once per shard.
    """

    def __init__(self, prefixes: Sequence[str], opener: Opener) -> None:
        """``prefixes``: how URIs begin that this is asked for, then what else they may begin with instead. ``opener``
        opens one place's URI."""
        self.prefixes, self.opener = tuple(prefixes), opener
        self.last_good = 0

    def open_if_there(self, uri: str) -> "MirroredSource | None":
        """The source at ``uri`` or its like elsewhere; None where all places say that there is nothing."""
        if not uri.startswith(self.prefixes[0]):
            raise DataError(f"{uri} has no mirrors: it does not begin with {self.prefixes[0]}")
        source = MirroredSource(uri, self)
        return source if source.there() else None

    def elsewhere(self, uri: str) -> list[tuple[int, str]]:
        """Every place's URI for ``uri``, from the last good place on."""
        count = len(self.prefixes)
        order = [(self.last_good + i) % count for i in range(count)]
        return [(i, self.prefixes[i] + uri[len(self.prefixes[0]) :]) for i in order]


class MirroredSource:
    """See :class:`sparktrain.tokens.source.Source`."""

    descriptor = None

    def __init__(self, uri: str, mirrors: Mirrors) -> None:
        self.uri = uri
        self._mirrors = mirrors
        self._open: dict[int, Source] = {}
        self._lock = Lock()
        self._size: int | None = None

    def there(self) -> bool:
        """Whether any place has it. Raises :class:`DataError` where none has it and one could not say."""
        problems = []
        for place, uri in self._mirrors.elsewhere(self.uri):
            try:
                if self._at(place, uri) is not None:
                    return True
            except DataError as problem:
                problems.append(str(problem))
        if problems:
            raise self._failed(problems)
        return False

    def size(self) -> int:
        assert self._size is not None, "there() comes first"
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        problems = []
        for place, uri in self._mirrors.elsewhere(self.uri):
            try:
                source = self._at(place, uri)
                if source is None:
                    raise DataError(f"{uri} does not exist")
                raw = source.read(offset, length)
                self._mirrors.last_good = place
                return raw
            except DataError as problem:
                problems.append(str(problem))
        raise self._failed(problems)

    def close(self) -> None:
        for source in self._open.values():
            source.close()

    def _at(self, place: int, uri: str) -> Source | None:
        with self._lock:
            if place not in self._open:
                source = self._mirrors.opener(uri)
                if source is None:
                    return None
                if self._size not in (None, source.size()):
                    raise DataError(f"{uri} has {source.size()} bytes, elsewhere it has {self._size}: mirror it again")
                self._open[place], self._size = source, source.size()
                self._mirrors.last_good = place
            return self._open[place]

    def _failed(self, problems: list[str]) -> DataError:
        return DataError(f"{self.uri} cannot be read from any of {len(self._mirrors.prefixes)}: {'; '.join(problems)}")
