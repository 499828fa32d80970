"""Receipts: what a rank has trained on, one row per sequence, in Parquet files beside its records.

A receipt is given for what the loop was handed, and counts where the step was committed by the same attempt
(``lineage.py``): steps that a killed attempt took after its last checkpoint are taken again, and are not doubled.

The digest is the crc32 of what was read (``TokenFile.digest_of``), as zlib's. It says at memory speed whether two
readings were the same, which no cryptographic hash does; against forgery stand the sha256 of the shard and, of the
receipts, the manifest of the checkpoint that they are a part of.
"""

import io
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sparktrain.atomic import write
from sparktrain.errors import DataError, LaunchError

# Rows that are held before they are written, checkpoint or not: some MB.
_MOST = 1 << 16


Ints = npt.NDArray[np.int64]


class Receipt(NamedTuple):
    """Of the sequences that a rank was given in a step, in columns.

    Args:
        slot, microshard_id: ``[n]``.
        digest: ``[n]``: of what was read.
        targets: ``[n]``: tokens that count.
    """

    step: int
    slot: Ints
    microshard_id: Ints
    digest: Sequence[int]
    targets: Ints


SCHEMA = pa.schema(
    [(name, pa.int64()) for name in ("generation", "rank", "step", "slot", "microshard_id", "digest", "targets")]
)


class Receipts:
    """Those of rank ``rank`` in attempt ``generation`` that are not on disk yet; ``file_of`` names the file that
    holds them up to a step."""

    def __init__(self, generation: int, rank: int, file_of: Callable[[int], Path]) -> None:
        self._generation, self._rank, self._file_of = generation, rank, file_of
        self._given: list[Receipt] = []
        self._rows = 0
        self._files: list[Path] = []

    def add(self, receipt: Receipt) -> None:
        """That of a batch."""
        if self._rows >= _MOST:  # before, so that no file holds a step of the checkpoint that comes next
            self.write()
        self._given.append(receipt)
        self._rows += len(receipt.slot)

    def take(self) -> tuple[list[Receipt], list[Path]]:
        """What came since it was taken last: receipts that somebody else is to write, and files that are written."""
        given, files = self._given, self._files
        self._given, self._rows, self._files = [], 0, []
        return given, files

    def write(self) -> None:
        """What there is, into a file of its own. Raises :class:`LaunchError` where that cannot be written."""
        if not self._given:
            return
        file = self._file_of(self._given[-1].step + 1)
        try:
            write(file, self.content(self._given))
        except OSError as error:
            raise LaunchError(
                f"receipts could not be written to {file}: {error.strerror or error}; make room or mend the file "
                "system, then start the same command again"
            ) from None
        self._given, self._rows = [], 0
        self._files.append(file)

    def content(self, receipts: Sequence[Receipt]) -> bytes:
        """``receipts`` as a Parquet file's content."""
        counts = [len(receipt.slot) for receipt in receipts]
        steps = np.repeat(np.array([receipt.step for receipt in receipts], dtype=np.int64), counts)
        columns = [np.full(len(steps), number) for number in (self._generation, self._rank)] + [steps]
        for name in ("slot", "microshard_id", "digest", "targets"):
            columns.append(np.fromiter(chain.from_iterable(getattr(r, name) for r in receipts), np.int64, len(steps)))
        file = io.BytesIO()
        pq.write_table(pa.table(columns, schema=SCHEMA), file)
        return file.getvalue()


def read(file: Path) -> pa.Table:
    """Receipts as a table. Raises :class:`DataError` where that is none."""
    try:
        return pq.read_table(io.BytesIO(file.read_bytes()), schema=SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"receipts {file} cannot be read: {error}: restore them from a copy") from None
