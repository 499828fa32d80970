"""What each microshard's bytes must be: crc32 of them, from before training, and looked up as they are read.

One file per shard, ``00000.u4``: a little-endian uint32 for each microshard. The driver has them made by executors
(``spark/digesting.py``), of the shards that cost no second transfer; a shard without a file is not checked.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparktrain.errors import DataError
from sparktrain.plan import Ints
from sparktrain.tokens.shard import Shard


class Digests:
    """Those in ``directory`` of ``shards``, whose microshards begin at ``firsts`` ``[len(shards) + 1]``. Files are read
    when they are first needed. Safe from several threads."""

    def __init__(self, directory: Path, shards: Sequence[Shard], firsts: Ints) -> None:
        self._directory = directory
        self._places = {shard.path: (n, int(firsts[n]), int(firsts[n + 1])) for n, shard in enumerate(shards)}
        self._known: dict[str, npt.NDArray[np.uint32] | None] = {}

    def check(self, path: str, microshard_ids: Ints, digests: Sequence[int]) -> None:
        """Raises :class:`DataError` where a microshard of the shard at ``path`` is to have another digest."""
        if path not in self._known:
            self._known[path] = self._read(path)
        known, (_, first, end) = self._known[path], self._places[path]
        if known is None:
            return
        if microshard_ids.min() < first or microshard_ids.max() >= end:
            strange = next(i for i in microshard_ids.tolist() if not first <= i < end)
            raise DataError(f"the plan has microshard {strange} in shard {path}, which it is not of: it was "
                            "changed; start again in another run.dir")  # fmt: skip
        expected, found = known[microshard_ids - first], np.array(digests, dtype=np.uint32)
        if (expected != found).any():
            at = int(np.argmax(expected != found))
            raise DataError(
                f"shard {path} has other bytes than when the run was planned: sequence {microshard_ids[at] - first} "
                f"has crc32 {found[at]:08x}, had {expected[at]:08x}; restore the shard"
            )

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
