"""The index job: what only a full read shows is one line, before training."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparktrain import tokens
from sparktrain.config import Data
from sparktrain.errors import DataError
from sparktrain.spark import index
from sparktrain.tokens import Shard, ds

RNG = np.random.default_rng(0)


def rows(path: Path, width: int, **more: Any) -> None:
    ids = RNG.integers(0, 500, (20, width))
    pq.write_table(pa.table({"input_ids": list(ids), **{name: list(ids) for name in more}}), path, row_group_size=6)


def mixed(directory: Path) -> None:
    """One shard of every format, all with other tokens."""
    ids = [RNG.integers(0, 500, 200) for _ in range(4)]
    ds.write(directory / "a.ds", [ids[0][:50], ids[0][50:]], 512, "t")
    (directory / "b.bin").write_bytes(ids[1].astype("<u2").tobytes())
    np.save(directory / "c.npy", ids[2].astype("<u2"))
    rows(directory / "d.parquet", 17)


def same(directory: Path) -> None:
    mixed(directory)
    np.save(directory / "z.npy", np.fromfile(directory / "b.bin", dtype="<u2"))


def falling(directory: Path) -> None:
    mixed(directory)
    (directory / "a.ds.index").write_bytes(np.array([150, 50, 200], dtype="<u8").tobytes())


def negative(directory: Path) -> None:
    np.save(directory / "n.npy", np.array([*range(70), -1, 3], dtype="<i4"))


def masked(directory: Path) -> None:
    mixed(directory)
    (directory / "a.ds.loss").write_bytes(bytes([1] * 99 + [2] + [0] * 100))


def null(directory: Path) -> None:
    pq.write_table(pa.table({"input_ids": [[1, 2], [3, None]]}), directory / "e.parquet")


def test_shards_of_every_format_are_indexed_as_inspected(spark: Any, tmp_path: Path) -> None:
    mixed(tmp_path)
    found = index.index_shards(spark, tokens.locate_shards(tmp_path), Data())
    inspected = [tokens.inspect(path) for path in tokens.find_shards(tmp_path)]
    assert [replace(shard, num_bytes=0, sha256="") for shard, _ in found] == inspected
    assert [shard.num_bytes for shard, _ in found] == [Path(shard.path).stat().st_size for shard, _ in found]
    for shard, _ in found[:2]:  # files of tokens and nothing else
        assert shard.sha256 == hashlib.sha256(Path(shard.path).read_bytes()).hexdigest()
    assert [shard.format for shard, _ in found] == ["ds", "raw", "npy", "parquet"]
    for shard, largest in found:
        assert largest == tokens.TokenFile(shard).read(0, shard.num_tokens).max()
    index.check_shards(found, Data(sequence_length=16), "data.path")
    index.check_vocabulary(found, Data(), 512)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (same, r"b\.bin and .*z\.npy hold the same tokens: remove one of them"),
        (falling, r"a\.ds\.index falls at byte 8: document 1 ends at token 50"),
        (masked, r"a\.ds\.loss has 2 at byte 99, expected 0 or 1"),
        (negative, r"n\.npy has token id -1 at token 70"),
        (null, r"e\.parquet has in row group 0, column input_ids, a row or value that is null"),
    ],
)
def test_what_a_full_read_shows_is_one_line(
    spark: Any, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        index.index_shards(spark, tokens.locate_shards(tmp_path), Data())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shards", "data", "message"),
    [
        (
            [Shard("a.parquet", 340, 4, "parquet", row_length=17)],
            Data(sequence_length=17),
            "a.parquet has rows of 17 tokens, a window has 18: set data.sequence_length to 16",
        ),
        (
            [Shard("a.npy", 340, 2, "npy", row_length=17)],
            Data(sequence_length=16, window="psyche"),
            "a.npy has rows of 17 tokens, a window has 16: set data.sequence_length to 17",
        ),
        ([Shard("a.ds", 16, 2)], Data(sequence_length=16), "a.ds has 16 tokens, fewer than one sequence of 16 . 1"),
        (
            [Shard("a.ds", 340, 2, tokenizer="x"), Shard("b.ds", 340, 2, tokenizer="y")],
            Data(sequence_length=16),
            "differ in their tokenizer, x and y",
        ),
    ],
)
def test_shards_that_do_not_fit_the_run_are_one_line(shards: list[Shard], data: Data, message: str) -> None:
    with pytest.raises(DataError, match=message):
        index.check_shards([(shard, 5) for shard in shards], data, "data.path")
