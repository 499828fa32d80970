"""Every format reads back what its own writer wrote, and names what it is not. Files are made here, byte by byte."""

import gzip
import io
import json
import os
import struct
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from sparktrain import tokens
from sparktrain.errors import DataError
from sparktrain.tokens import IGNORED, Shard, TokenFile, ds
from sparktrain.tokens.sequences import pieces

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def megatron(path: Path, **changes: object) -> Path:
    """Sequences of 4, 0, 5 and 3 tokens in two documents, the second of which has the last two."""
    parts = {
        "magic": b"MMIDIDX\x00\x00",
        "version": 1,
        "code": 8,
        "lengths": [4, 0, 5, 3],
        "offsets": [0, 8, 8, 18],
        "documents": [0, 2, 4],
        "counts": (4, 3),
        "content": np.array(IDS, dtype="<u2").tobytes(),
        "tail": b"",
    } | changes
    path.write_bytes(parts["content"])  # type: ignore[arg-type]
    header = struct.pack("<9sQBQQ", parts["magic"], parts["version"], parts["code"], *parts["counts"])  # type: ignore[misc]
    arrays = [
        np.array(parts[n], t).tobytes() for n, t in (("lengths", "<i4"), ("offsets", "<i8"), ("documents", "<i8"))
    ]
    path.with_suffix(".idx").write_bytes(header + b"".join(arrays) + parts["tail"])  # type: ignore[operator]
    return path


@pytest.mark.parametrize("name", ["a.bin", "a.npy"])
@pytest.mark.parametrize(("token_size", "stated"), [(2, None), (2, 2), (4, 4)])
def test_raw_tokens_are_two_bytes_wide_unless_stated(
    tmp_path: Path, name: str, token_size: int, stated: int | None
) -> None:
    path = tmp_path / name
    path.write_bytes(np.array(IDS, dtype=f"<u{token_size}").tobytes())
    shard = tokens.inspect(str(path), stated)
    assert shard == Shard(str(path), 12, token_size, "raw")
    assert TokenFile(shard).read(2, 5).tolist() == IDS[2:7]


@pytest.mark.parametrize("kind", ["<u2", "<u4", "<i4", "<i8"])
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_a_numpy_array_is_known_by_its_header(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array(IDS, dtype=kind).reshape(shape))
    shard = tokens.inspect(str(path))
    assert (shard.num_tokens, shard.token_size, shard.format) == (12, int(kind[2]), "npy")
    assert shard.row_length == (4 if len(shape) == 2 else 0)
    assert TokenFile(shard).read(4, 8).tolist() == IDS[4:]
    if shard.row_length:
        with pytest.raises(DataError, match="has rows of 4 tokens, asked for 5 from token 4"):
            TokenFile(shard).read(4, 5)
    assert Shard.from_json(json.loads(json.dumps(asdict(shard)))) == shard


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.array(IDS, dtype=">u4")), r"is an array of >u4 of shape \(12,\) in C order: expected"),
        (npy(np.array(IDS, dtype="<f4")), "is an array of <f4"),
        (npy(np.array(IDS, dtype="<u2").reshape(3, 2, 2)), r"of shape \(3, 2, 2\)"),
        (npy(np.asfortranarray(np.array(IDS, dtype="<u2").reshape(3, 4))), "in Fortran order"),
        (npy(np.zeros((0, 4), dtype="<u2")), r"is empty, an array of shape \(0, 4\)"),
        (
            npy(np.array(IDS, dtype="<u2"))[:-1],
            r"has 151 bytes, its header says 152 \(shape \(12,\) of <u2\): it is torn",
        ),
        (npy(np.array(IDS, dtype="<u2")) + b"x", "has 153 bytes, its header says 152"),
        (npy(np.array(IDS, dtype="<u2"))[:20], "has a NumPy header that cannot be read"),
        (b"\x93NUMPY\x09\x00" + bytes(80), r"has a NumPy header that cannot be read \(.*version"),
    ],
)
def test_numpy_arrays_that_hold_no_tokens_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    refused(tmp_path / "a.npy", message)


@pytest.mark.parametrize(("code", "kind"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "u1")])
@pytest.mark.parametrize("tail", [b"", bytes(4)])
def test_megatrons_sequences_are_a_stream_with_boundaries(tmp_path: Path, code: int, kind: str, tail: bytes) -> None:
    size = np.dtype(kind).itemsize
    content, offsets = np.array(IDS, dtype=kind).tobytes(), [0, 4 * size, 4 * size, 9 * size]
    path = megatron(tmp_path / "m.bin", code=code, content=content, offsets=offsets, tail=tail)
    shard = tokens.inspect(str(path))
    assert (shard.format, shard.num_tokens, shard.token_size, shard.num_documents) == ("megatron", 12, size, 2)
    file = TokenFile(shard)
    assert file.read(0, 12).tolist() == IDS
    assert file.document_ends().tolist() == [4, 12]
    assert file.window(2, 5).sequence_lengths.tolist() == [2, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": b"TNTIDX\0\0\0"}, "m.idx begins with .*: it is no Megatron index"),
        ({"version": 2}, "m.idx has version 2, expected 1"),
        ({"code": 6}, "m.idx says its tokens are f8, expected integers"),
        ({"code": 99}, "m.idx says its tokens are unknown code 99"),
        ({"counts": (4, 1)}, "m.idx has 4 sequences and 1 entries in its document index, expected at least 1 and 2"),
        ({"counts": (2**60, 3)}, "m.idx has 106 bytes, expected .* it is torn"),
        ({"tail": b"xx"}, "m.idx has 108 bytes, expected 106 for 4 sequences"),
        ({"content": b"abc"}, "m.bin has 3 bytes, not a multiple of the 2 that .*m.idx says a token has"),
        ({"offsets": [0, 8, 10, 18]}, "m.idx has sequence 2 of 5 tokens at byte 10, expected at byte 8"),
        ({"lengths": [4, -1, 6, 3]}, "m.idx has sequence 1 of -1 tokens"),
        ({"content": bytes(20)}, "m.idx has 12 tokens, .*m.bin has 10"),
        ({"documents": [0, 3, 3]}, "m.idx has a document index that does not rise from 0 to its 4 sequences"),
        ({"documents": [1, 2, 4]}, "m.idx has a document index that does not rise"),
    ],
)
def test_every_defect_of_a_megatron_index_is_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    refused(megatron(tmp_path / "m.bin", **changes), message)


def test_a_torn_megatron_header_and_another_token_size_are_named(tmp_path: Path) -> None:
    path = megatron(tmp_path / "m.bin")
    with pytest.raises(DataError, match=r"has tokens of 2 bytes by its .idx, data.token_size is 4"):
        tokens.inspect(str(path), 4)
    (tmp_path / "m.idx").write_bytes(b"MMIDIDX\0\0")
    refused(path, "m.idx has 9 bytes, fewer than the 34 of its header")


def test_documents_and_targets_of_a_datatrove_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.ds"
    ds.write(path, [np.array(d) for d in (IDS[:4], [], IDS[4:9], IDS[9:])], 512, "tok")
    Path(f"{path}.loss").write_bytes(bytes([0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]))
    shard = tokens.inspect(str(path))
    assert (shard.num_documents, shard.tokenizer, shard.columns) == (4, "tok", ("labels",))
    file = TokenFile(shard)
    assert file.document_ends().tolist() == [4, 4, 9, 12]
    batch = tokens.read_sequences([(file, 6), (file, 0)], 5)
    assert batch.tokens.tolist() == [IDS[6:11], IDS[:5]]
    assert batch.labels.tolist() == [[2, IGNORED, 5, 3, 5], [IGNORED, IGNORED, 4, 1, 5]]  # type: ignore[union-attr]
    assert [lengths.tolist() for lengths in batch.sequence_lengths] == [[3, 2], [4, 1]]  # type: ignore[union-attr]
    assert batch.num_targets == 2 + 2  # not the first tokens of documents either
    Path(f"{path}.loss").write_bytes(bytes([0, 7] + [1] * 10))
    with pytest.raises(DataError, match=r"a.ds.loss has 7 at byte 1, expected 0 or 1"):
        file.window(0, 4)


@pytest.mark.parametrize(
    ("side", "content", "message"),
    [
        ("index", bytes(12), "index has 12 bytes, not a positive multiple of 8"),
        ("index", b"", "index has 0 bytes"),
        ("index", struct.pack("<2Q", 4, 13), "index ends at token 13, the shard has 12"),
        (
            "index",
            struct.pack("<3Q", 5, 4, 12),
            "index falls at byte 8: document 1 ends at token 4, the one before it at 5",
        ),
        ("index", struct.pack("<2Q", 2**63, 12), "index falls at byte 0"),
        ("loss", bytes(11), "loss has 11 bytes, the shard has 12 tokens"),
    ],
)
def test_side_files_of_another_shard_are_named(tmp_path: Path, side: str, content: bytes, message: str) -> None:
    ds.write(tmp_path / "a.ds", [np.array(IDS)], 512, "tok")
    Path(f"{tmp_path}/a.ds.{side}").write_bytes(content)
    refused(tmp_path / "a.ds", message)


def test_a_token_size_that_the_metadata_contradicts_is_refused_with_both(tmp_path: Path) -> None:
    ds.write(tmp_path / "a.ds", [np.array(IDS)], 512, "tok")
    with pytest.raises(DataError, match=r"tokens of 2 bytes by its .metadata, data.token_size is 4"):
        tokens.inspect(str(tmp_path / "a.ds"), 4)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("suffix", [".ds", ".bin", ".npy", ".parquet"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS, "is a git-lfs pointer, not the file itself: run git lfs pull"),
        (gzip.compress(bytes(99), mtime=0), "is gzip-compressed: unpack it"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "is zstd-compressed: unpack it"),
        (b"\n <!DOCTYPE html><title>404</title>", "is a web page, likely an error message"),
        (b"<html><body>404", "is a web page"),
        (b"PK\x03\x04" + bytes(99), "is a zip archive .a PyTorch checkpoint is one.: take it out"),
        (bytes(257) + b"ustar\x0000" + bytes(300), "is a tar archive"),
        (b"", "is empty: remove it or write it again"),
    ],
)
def test_what_only_has_a_shards_name_is_told_by_its_first_bytes(
    tmp_path: Path, suffix: str, content: bytes, message: str
) -> None:
    (tmp_path / f"x{suffix}").write_bytes(content)
    refused(tmp_path / f"x{suffix}", message)


def test_formats_under_another_formats_name_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.ds").write_bytes(npy(np.array(IDS, dtype="<u2")))
    refused(tmp_path / "a.ds", r"is a NumPy array: name it \*\.npy")
    (tmp_path / "b.bin").write_bytes(b"PAR1" + bytes(40))
    refused(tmp_path / "b.bin", r"is a Parquet file: name it \*\.parquet")


def text_like(vocab: int, seed: int = 0) -> np.ndarray:
    """Ids as a tokenizer gives them: the frequent ones are small."""
    return np.minimum(np.random.default_rng(seed).zipf(1.2, 4000), vocab) - 1


@pytest.mark.parametrize(
    ("vocab", "kind", "stated", "message"),
    [
        (150_000, "<u4", None, "read as tokens of 2 bytes, but looks like 4-byte tokens .*: set data.token_size to 4"),
        (32_000, "<u4", 2, "looks like 4-byte tokens"),
        (32_000, "<u2", 4, "read as tokens of 4 bytes, but looks like 2-byte tokens"),
        (65_536, "<u2", 4, "looks like 2-byte tokens"),
        (150_000, ">u4", None, "looks like big-endian 4-byte tokens"),
        (150_000, ">u4", 4, "looks like big-endian 4-byte tokens"),
        (32_000, ">u2", None, "looks like big-endian tokens"),
    ],
)
def test_a_wrong_token_size_is_seen_in_the_tokens(
    tmp_path: Path, vocab: int, kind: str, stated: int | None, message: str
) -> None:
    (tmp_path / "a.bin").write_bytes(text_like(vocab).astype(kind).tobytes())
    with pytest.raises(DataError, match=message):
        tokens.inspect(str(tmp_path / "a.bin"), stated)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("vocab", "size"), [(256, 2), (512, 2), (32_000, 2), (65_536, 2), (70_000, 4), (1_000_000, 4)])
def test_tokens_of_the_right_size_are_not_suspected(tmp_path: Path, vocab: int, size: int, seed: int) -> None:
    for ids in (
        text_like(vocab, seed),
        np.random.default_rng(seed).integers(0, vocab, 4000),
        np.zeros(4000),
        np.arange(256),
    ):
        (tmp_path / "a.bin").write_bytes(ids.astype(f"<u{size}").tobytes())
        assert tokens.inspect(str(tmp_path / "a.bin"), size).num_tokens == len(ids)


def test_shards_of_different_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    a = ds.write(tmp_path / "a.ds", [np.array(IDS)], 512, "llama")
    b = ds.write(tmp_path / "b.ds", [np.array(IDS)], 512, "gpt2")
    c = ds.write(tmp_path / "c.ds", [np.array(IDS)], 70_000, "llama")
    unnamed = Shard(str(tmp_path / "d.bin"), 12, 2, "raw")
    tokens.check_alike([a, unnamed, a])
    with pytest.raises(
        DataError, match=r"a.ds and .*b.ds differ in their tokenizer, llama and gpt2: train on what one tokenizer made"
    ):
        tokens.check_alike([a, unnamed, b])
    with pytest.raises(DataError, match=r"a.ds and .*c.ds differ in their token size, 2 and 4"):
        tokens.check_alike([a, c])


def test_the_same_file_twice_in_a_directory_is_refused(tmp_path: Path) -> None:
    ds.write(tmp_path / "a.ds", [np.array(IDS)], 512, "t")
    (tmp_path / "b.ds").symlink_to(tmp_path / "a.ds")
    with pytest.raises(DataError, match=r"shard .*a.ds is in the data twice, by name or by a link: name it once"):
        tokens.find_shards(tmp_path)


def test_an_unreadable_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.ds").mkdir()
    refused(tmp_path / "a.ds", "cannot be read: it is no regular file")
    os.mkfifo(tmp_path / "b.ds")
    refused(tmp_path / "b.ds", "cannot be read: it is no regular file")
    (tmp_path / "c.ds").symlink_to(tmp_path / "c.ds")
    refused(tmp_path / "c.ds", "cannot be read: Too many levels of symbolic links")


def test_documents_are_cut_where_a_window_cuts_them() -> None:
    ends = np.array([0, 4, 4, 9, 12])
    for start in range(12):
        for length in range(1, 13 - start):
            document = np.searchsorted(ends, np.arange(start, start + length), side="right")
            assert pieces(ends, start, length).tolist() == np.unique(document, return_counts=True)[1].tolist()


def refused(path: Path, message: str) -> None:
    """Inspecting and reading ``path`` in full is one line that names it."""
    with pytest.raises(DataError, match=message) as caught:
        TokenFile(tokens.inspect(str(path))).document_ends()
    assert "\n" not in str(caught.value)
    assert path.stem in str(caught.value)
