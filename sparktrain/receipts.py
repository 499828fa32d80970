"""Receipts: what a rank has trained on, one row per sequence, in Parquet files beside its records.

A receipt is given for what the loop was handed, and counts where the step was committed by the same attempt
(``lineage.py``): steps that a killed attempt took after its last checkpoint are taken again, and are not doubled.

The digest is zlib's crc32 of what was read (``TokenFile.digest_of``). It says at memory speed whether two readings were
the same, which no cryptographic hash does; against forgery stand the sha256 of the shard and, of the receipts, the
manifest of the checkpoint that they are a part of.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sparktrain.atomic import write
from sparktrain.errors import DataError, LaunchError

# Rows that are held before they are written, checkpoint or not: some MB.
_MOST = 1 << 16


# Of a sequence that a rank was given: step, slot, microshard, digest, targets (its tokens that count).
Receipt = tuple[int, int, int, int, int]

SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("generation", "rank", "step", "slot", "microshard_id", "digest", "targets")]
)


class Receipts:
    """Those of rank ``rank`` in attempt ``generation`` that are not on disk yet; ``file_of`` names the file that
    holds them up to a step."""

    def __init__(self, generation: int, rank: int, file_of: Callable[[int], Path]) -> None:
        self._generation, self._rank, self._file_of = generation, rank, file_of
        self._rows: list[Receipt] = []
        self._files: list[Path] = []

    def add(self, receipts: Sequence[Receipt]) -> None:
        """Those of a batch."""
        if len(self._rows) >= _MOST:  # before, so that no file holds a step of the checkpoint that comes next
            self.write()
        self._rows += receipts

    def take(self) -> tuple[list[Receipt], list[Path]]:
        """What came since it was taken last: receipts that somebody else is to write, and files that are written."""
        rows, files = self._rows, self._files
        self._rows, self._files = [], []
        return rows, files

    def write(self) -> None:
        """What there is, into a file of its own. Raises :class:`LaunchError` where that cannot be written."""
        if not self._rows:
            return
        file = self._file_of(self._rows[-1][0] + 1)
        try:
            write(file, self.content(self._rows))
        except OSError as error:
            raise LaunchError(
                f"receipts could not be written to {file}: {error.strerror or error}; make room or mend the file "
                "system, then start the same command again"
            ) from None
        self._rows = []
        self._files.append(file)

    def content(self, receipts: Sequence[Receipt]) -> bytes:
        """``receipts`` as a Parquet file's content."""
        by_rank = [[number] * len(receipts) for number in (self._generation, self._rank)]
        columns = [*by_rank, *zip(*receipts, strict=True)] if receipts else [[]] * len(SCHEMA)
        file = io.BytesIO()
        pq.write_table(pa.table([pa.array(column, pa.int64()) for column in columns], schema=SCHEMA), file)
        return file.getvalue()


def read(file: Path) -> pa.Table:
    """Receipts as a table. Raises :class:`DataError` where that is none."""
    try:
        return pq.read_table(io.BytesIO(file.read_bytes()), schema=SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"receipts {file} cannot be read: {error}: restore them from a copy") from None
