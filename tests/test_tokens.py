"""Token shards: what is written is read, and what is no shard is named."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sparktrain import tokens
from sparktrain.errors import DataError
from sparktrain.tokens import Shard, TokenFile, ds


@pytest.mark.parametrize(("vocab", "size"), [(512, 2), (65536, 2), (65537, 4), (200_000, 4)])
def test_a_shard_has_datatroves_bytes(tmp_path: Path, vocab: int, size: int) -> None:
    documents = [np.array([1, 2, 3, vocab - 1]), np.array([5, 0])]
    shard = ds.write(tmp_path / "a.ds", documents, vocab, "tok")
    assert (
        shard
        == tokens.inspect(str(tmp_path / "a.ds"))
        == Shard(str(tmp_path / "a.ds"), 6, size, num_documents=2, tokenizer="tok")
    )
    assert (tmp_path / "a.ds").read_bytes() == b"".join(
        int(t).to_bytes(size, "little") for document in documents for t in document
    )
    assert (tmp_path / "a.ds.index").read_bytes() == (4).to_bytes(8, "little") + (6).to_bytes(8, "little")
    assert (tmp_path / "a.ds.metadata").read_text().splitlines()[:2] == [f"tok|{size}", "6"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ds", "a.ds.index", "a.ds.metadata"]


def test_two_attempts_at_one_shard_do_not_take_each_others_file(tmp_path: Path) -> None:
    def documents() -> Iterator[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
        yield np.arange(5)
        ds.write(tmp_path / "a.ds", [np.arange(5), np.arange(3)], 10, "tok")  # another attempt, faster than this one
        yield np.arange(3)

    assert ds.write(tmp_path / "a.ds", documents(), 10, "tok") == tokens.inspect(str(tmp_path / "a.ds"))
    assert (tmp_path / "a.ds").stat().st_size == 2 * 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ds", "a.ds.index", "a.ds.metadata"]


@pytest.mark.parametrize(
    ("tokens_", "said"), [(6, "6.00 T"), (999, "999 T"), (1000, "1.00 kT"), (12345, "12.3 kT"), (999_999, "1.00 MT")]
)
def test_the_metadata_counts_for_people_as_datatrove_does(tmp_path: Path, tokens_: int, said: str) -> None:
    ds.write(tmp_path / "a.ds", [np.zeros(tokens_, dtype=np.int64)], 10, "tok")
    assert (tmp_path / "a.ds.metadata").read_text().splitlines()[2] == said


def test_any_window_can_be_read(tmp_path: Path) -> None:
    file = TokenFile(ds.write(tmp_path / "a.ds", [np.arange(100)], 1000, "tok"))
    assert file.read(0, 100).tolist() == list(range(100))
    assert file.read(37, 5).tolist() == [37, 38, 39, 40, 41]


def test_shards_are_found_sorted_and_without_their_side_files(tmp_path: Path) -> None:
    for name in ("b.ds", "a.ds", "c.ds"):
        ds.write(tmp_path / name, [np.arange(9)], 10, "tok")
    assert [Path(p).name for p in tokens.find_shards(tmp_path)] == ["a.ds", "b.ds", "c.ds"]


def test_a_file_truncated_after_it_was_opened_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = TokenFile(ds.write(tmp_path / "a.ds", [np.arange(100)], 1000, "tok"))
    (tmp_path / "a.ds").write_bytes(bytes(100))
    with pytest.raises(DataError, match=r"a\.ds ends at byte 100, expected at least 200: it was truncated"):
        file.read(0, 100)


@pytest.mark.parametrize(
    ("content", "metadata", "message"),
    [
        (b"", None, "is empty"),
        (b"abc", None, "3 bytes, not a multiple of its token size 2"),
        (b"abcdef", "tok|4\n1\n", "6 bytes, not a multiple of its token size 4"),
        (b"abcd", "tok|2\n7\n", "holds 2 tokens of 2 bytes, its .metadata says 7"),
        (b"abcd", "Unknown Tokenizer|4|8\n1\n", "is not shard metadata"),
        (b"abcd", "", "is not shard metadata"),
    ],
)
def test_what_is_no_shard_is_named(tmp_path: Path, content: bytes, metadata: str | None, message: str) -> None:
    path = tmp_path / "x.ds"
    path.write_bytes(content)
    if metadata is not None:
        Path(f"{path}.metadata").write_text(metadata)
    with pytest.raises(DataError, match=message) as caught:
        tokens.inspect(str(path))
    assert "x.ds" in str(caught.value)


def test_a_shard_that_may_not_be_read_is_named() -> None:
    with tempfile.TemporaryDirectory() as directory:  # the user's own, whereas pytest's are nobody else's
        os.chmod(directory, 0o755)
        path = Path(directory, "x.ds")
        path.write_bytes(b"abcd")
        path.chmod(0)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(
                DataError, match=r"x\.ds cannot be read: Permission denied; let the user that"
            ) as caught:
                tokens.inspect(str(path))
        finally:
            os.seteuid(user)
    assert "\n" not in str(caught.value)


def test_directories_without_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"does not exist: give a directory with \*\.ds/\*\.bin/\*\.npy/\*\.parquet shards"
    ):
        tokens.find_shards(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no \*\.ds/\*\.bin/.* shards"):
        tokens.find_shards(tmp_path)
