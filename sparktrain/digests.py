"""What each microshard's bytes must be: crc32 of them, from before training, and compared as they are read.

One file per shard, ``00000.u4``: a little-endian uint32 for each microshard. The driver has them made by executors
(``spark/digesting.py``), of the shards that cost no second transfer; a shard without a file is not checked.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparktrain.errors import DataError
from sparktrain.plan import Ints, Share
from sparktrain.tokens.shard import Shard


class Digests:
    """Those in ``directory`` of ``shards``, whose microshards begin at ``firsts`` ``[len(shards) + 1]``. Files are read
    when they are first needed. Safe from several threads."""

    def __init__(self, directory: Path, shards: Sequence[Shard], firsts: Ints) -> None:
        self._directory = directory
        self._places = {shard.path: (n, int(firsts[n]), int(firsts[n + 1])) for n, shard in enumerate(shards)}
        self._known: dict[str, npt.NDArray[np.uint32] | None] = {}

    def of(self, share: Share) -> Ints:
        """``[n]`` int64: what each microshard of ``share`` is to have; -1: that is not known. Raises
        :class:`DataError` for a microshard that its shard, whose digests are known, has not; and for a file of them
        that was changed."""
        found = np.full(len(share), -1, dtype=np.int64)
        order = np.argsort(share.path, kind="stable")
        bounds = np.searchsorted(share.path[order], np.arange(len(share.paths) + 1)).tolist()
        for name, begin, end in zip(share.paths, bounds, bounds[1:], strict=False):
            if begin == end:
                continue
            if name not in self._known:
                self._known[name] = self._read(name)
            known, (_, first, last) = self._known[name], self._places[name]
            if known is None:
                continue
            ids = share.microshard_id[order[begin:end]]
            if ids.min() < first or ids.max() >= last:
                strange = next(i for i in ids.tolist() if not first <= i < last)
                raise DataError(f"the plan has microshard {strange} in shard {name}, which it is not of: it was "
                                "changed; start again in another run.dir")  # fmt: skip
            found[order[begin:end]] = known[ids - first]
        return found

    def _read(self, path: str) -> npt.NDArray[np.uint32] | None:
        number, first, end = self._places[path]
        file = file_of(self._directory, number)
        if not file.exists():
            return None
        known = np.frombuffer(file.read_bytes(), dtype="<u4")
        if len(known) != end - first:
            raise DataError(
                f"{file} has {len(known)} digests, expected {end - first} of {path}: it was changed; remove it, and "
                "the shard is not checked"
            )
        return known


def file_of(directory: Path, number: int) -> Path:
    """The digests of the ``number``-th shard."""
    return directory / f"{number:05d}.u4"
