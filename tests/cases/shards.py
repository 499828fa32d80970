"""Shards, and what lies beside them, that cannot be trained on."""

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparktrain.tokens import ds
from tests.cases import Case, Place, damaged, edit, flags, swap
from tests.web import serve

FIRST, SECOND, NEW = "00000_00000_shuffled.ds", "00001_00000_shuffled.ds", "00003_00000_shuffled.ds"
Change = Callable[[Path], Any]


def place_of(path: Callable[[Place], str], *more: str) -> Callable[[Place], list[str]]:
    """jobs/train.py on data elsewhere."""
    return lambda place: swap(place.train(*more), "--data.path", path(place))


def new(name: str, content: bytes) -> Change:
    """One more file among shards that are whole."""
    return lambda train: (train / name).write_bytes(content)


def ids(*values: int, kind: str = "<u2") -> bytes:
    return np.array(values or np.arange(2000) % 512, dtype=kind).tobytes()


def extra(tokens: Any, tokenizer: str = "random walk", vocabulary: int = 512) -> Change:
    """One more shard, whole in itself."""
    return lambda train: ds.write(train / NEW, [np.asarray(tokens)], vocabulary, tokenizer)


def changed(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda train: edit(train / name, change)


def at(position: int, value: int) -> Any:
    tokens = np.arange(4000) % 512
    tokens[position] = value
    return tokens


def tar(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file.getvalue()


def only(train: Path) -> None:
    """No shard, just what lies beside one."""
    for file in train.iterdir():
        if file.suffix == ".ds":
            file.unlink()


def empty(train: Path) -> None:
    shutil.rmtree(train)
    train.mkdir()


SIMPLE = [
    Case("data missing", damaged(shutil.rmtree), 3, "data directory .*train does not exist: give a directory with"),
    Case("data empty", damaged(empty), 3, "holds no .* shards: make some with jobs/tokenize.py"),
    Case("only side files", damaged(only), 3, "holds no .* shards: make some with jobs/tokenize.py"),
    Case("shard empty", damaged(new(NEW, b"")), 3, f"shard .*{NEW} is empty: remove it or write it again"),
    Case("shard is a directory", damaged(lambda t: (t / NEW).mkdir()), 3, f"{NEW} cannot be read: it is no regular"),
    Case("shard is a pipe", damaged(lambda t: os.mkfifo(t / NEW)), 3, f"{NEW} cannot be read: it is no regular file"),
    Case("link to nothing", damaged(lambda t: (t / NEW).symlink_to("x")), 3, f"{NEW} does not exist|cannot be read"),
    Case("link to a shard", damaged(lambda t: (t / NEW).symlink_to(t / FIRST)), 3, "is in the data twice"),
    Case("hard link to a shard", damaged(lambda t: (t / NEW).hardlink_to(t / FIRST)), 3, "hold the same tokens: remov"),
    Case("shard too short", damaged(extra(np.arange(20))), 3, f"{NEW} has 20 tokens, fewer than one sequence of 32"),
    Case("odd bytes", damaged(changed(SECOND, lambda c: c + b"x")), 3, f"{SECOND} has 8001 bytes, not a multiple of"),
    Case("torn shard", damaged(changed(SECOND, lambda c: c[:4000])), 3, f"{SECOND} holds 2000 tokens .*says 4000"),
    Case(
        "git-lfs",
        damaged(new("3.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")),
        3,
        "3.bin is a git-lfs pointer, not the file itself: run git lfs pull",
    ),
    Case("gzip", damaged(new("3.bin", gzip.compress(ids()))), 3, "3.bin is gzip-compressed: unpack it"),
    Case("zstd", damaged(new("3.bin", b"\x28\xb5\x2f\xfd" + ids())), 3, "3.bin is zstd-compressed: unpack it"),
    Case("tar", damaged(new("3.bin", tar("x.bin"))), 3, "3.bin is a tar archive: unpack it"),
    Case("web page", damaged(new("3.bin", b"<!DOCTYPE html><html>404</html>")), 3, "3.bin is a web page, likely an"),
    Case("a checkpoint", damaged(new("3.bin", b"PK\x03\x04" + ids())), 3, "3.bin is a zip archive .a PyTorch checkpo"),
    Case("Parquet as raw", damaged(new("3.bin", b"PAR1" + ids())), 3, r"3.bin is a Parquet file: name it \*.parquet"),
    Case("NumPy as raw", damaged(new("3.bin", b"\x93NUMPY" + ids())), 3, r"3.bin is a NumPy array: name it \*.npy"),
    Case("4 bytes read as 2", damaged(new("3.bin", ids(kind="<u4"))), 3, "looks like 4-byte tokens .* data.token_size"),
    Case("big-endian", damaged(new("3.bin", ids(kind=">u4"))), 3, "looks like big-endian 4-byte tokens: write it"),
    Case(
        "2 bytes read as 4",
        damaged(lambda t: (empty(t), (t / "3.bin").write_bytes(ids())), "--data.token-size", "4"),
        3,
        "looks like 2-byte tokens .*: set data.token_size to 2",
    ),
    Case(
        "token size against metadata",
        damaged(lambda t: None, "--data.token-size", "4"),
        3,
        "has tokens of 2 bytes by its .metadata, data.token_size is 4: leave data.token_size out",
    ),
    Case(
        "metadata garbled",
        damaged(changed(f"{FIRST}.metadata", lambda c: b"what")),
        3,
        f"{FIRST}.metadata is not shard metadata: expected 'tokenizer|2' .* found 'what'",
    ),
    Case(
        "metadata of no tokenizer",
        damaged(changed(f"{FIRST}.metadata", lambda c: b"Unknown Tokenizer|4|4\n9\n")),
        3,
        f"{FIRST} has|{FIRST} holds 2000 tokens of 4 bytes, its .metadata says 9",
    ),
    Case(
        "metadata of 8 bytes",
        damaged(changed(f"{FIRST}.metadata", lambda c: b"t|8\n4000\n")),
        3,
        f"{FIRST}.metadata is not shard metadata: expected 'tokenizer|2'",
    ),
    Case(
        "metadata counts wrong",
        damaged(changed(f"{FIRST}.metadata", lambda c: b"random walk|2\n3999\n")),
        3,
        f"{FIRST} holds 4000 tokens of 2 bytes, its .metadata says 3999",
    ),
    Case("index torn", damaged(changed(f"{FIRST}.index", lambda c: c[:3])), 3, f"{FIRST}.index has 3 bytes, not a po"),
    Case(
        "index of another",
        damaged(changed(f"{FIRST}.index", lambda c: ids(7, kind="<u8"))),
        3,
        f"{FIRST}.index ends at token 7, the shard has 4000: one of the two is from another file",
    ),
    Case(
        "index falls",
        damaged(changed(f"{FIRST}.index", lambda c: ids(150, 50, 4000, kind="<u8"))),
        3,
        f"{FIRST}.index falls at byte 8: document 1 ends at token 50, the one before it at 150",
    ),
    Case("loss too short", damaged(new(f"{FIRST}.loss", b"\1" * 3)), 3, f"{FIRST}.loss has 3 bytes, the shard has 40"),
    Case("loss of 2", damaged(new(f"{FIRST}.loss", b"\1" * 99 + b"\2" * 3901)), 3, f"{FIRST}.loss has 2 at byte 99, e"),
    Case(
        "token over vocabulary",
        damaged(extra(at(1234, 700))),
        3,
        f"{NEW} has token id 700 at token 1234, but the model's vocab_size is 512",
    ),
    Case(
        "token negative",
        damaged(lambda t: (empty(t), np.save(t / "n.npy", np.array([*range(70), -1, 3], "<i4")))),
        3,
        "n.npy has token id -1 at token 70: write it again",
    ),
    Case(
        "same tokens twice",
        damaged(lambda t: np.save(t / "z.npy", np.fromfile(t / FIRST, "<u2"))),
        3,
        f"{FIRST} and .*z.npy hold the same tokens: remove one of them",
    ),
    Case("two tokenizers", damaged(extra(at(0, 0), "other")), 3, "differ in their tokenizer, random walk and other"),
    Case(
        "two token sizes",
        damaged(lambda t: np.save(t / "z.npy", np.arange(4000, dtype="<i4") % 500)),
        3,
        "differ in their token size, 2 and 4: train on what one tokenizer made",
    ),
    Case("floats", damaged(lambda t: np.save(t / "z.npy", np.zeros(100))), 3, "z.npy is an array of <f8 .*: expected"),
    Case("NumPy's objects", damaged(lambda t: np.save(t / "z.npy", np.array([None, 1]))), 3, "shard .*z.npy"),
    Case(
        "NumPy's header torn", damaged(new("z.npy", b"\x93NUMPY\x01\x00\xff\xff{" + b" " * 90)), 3, "z.npy has a NumPy"
    ),
    Case("skip of no shard", flags("--data.skip", '[{"shard": "nowhere.ds"}]'), 3, "data.skip names shard nowhere.ds"),
    Case(
        "skip of all",
        flags("--data.skip", json.dumps([{"shard": f"{i:05d}_00000_shuffled.ds"} for i in range(3)])),
        3,
        "data.skip names all .* sequences of data.path: leave some",
    ),
    Case(
        "unknown scheme", place_of(lambda p: "gopher://h/d"), 3, "gopher://h/d has the scheme gopher://, which is unk"
    ),
    Case("template", place_of(lambda p: "https://h/x-{3..1}.ds"), 3, "is no template: expected numbers of the same"),
    Case("password", place_of(lambda p: "https://me:hunter2@h/x.ds"), 3, "given with a password: it would end up in"),
    Case(
        "signed",
        place_of(lambda p: "https://h/x.ds?sig=hunter2"),
        3,
        "https://h/x.ds is given with a query, often a signature",
    ),
    Case("no dataset of the Hub", place_of(lambda p: "hf://a/b"), 3, "hf://a/b is no dataset of the Hub: expected hf:"),
]


def sealed(change: Callable[[dict[str, Any]], Any]) -> Change:
    """A manifest of one shard, with a mistake."""

    def make(train: Path) -> None:
        content = (train / FIRST).read_bytes()
        entry: dict[str, Any] = {"path": FIRST, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest: Any = {"format": "sparktrain-tokens/1", "shards": [entry]}
        change(entry)
        (train / "manifest.json").write_text(json.dumps(manifest))

    return make


def number(text: str) -> Change:
    """A manifest whose shard has such a number of bytes."""

    def make(train: Path) -> None:
        sealed(lambda e: e.update(bytes="NUMBER"))(train)
        edit(train / "manifest.json", lambda c: c.replace(b'"NUMBER"', text.encode()))

    return make


MANIFESTS = [
    *(
        Case(
            f"manifest names {name!r}",
            damaged(sealed(lambda e, name=name: e.update(path=name))),
            3,
            "manifest.json names the shard .* which is not inside its directory: do not trust it",
        )
        for name in ("../x.ds", "/etc/x.ds", "a\\..\\..\\x.ds", "a\0.ds", "%2e%2e/x.ds", "file:///x.ds")
    ),
    Case("manifest torn", damaged(new("manifest.json", b'{"format": ')), 3, "manifest.json is no JSON: it is torn"),
    Case("manifest a bomb", damaged(new("manifest.json", b"[" * 100_000)), 3, "manifest.json is no JSON"),
    Case("manifest not UTF-8", damaged(new("manifest.json", b'{"a": "\xff"}')), 3, "manifest.json is no JSON"),
    Case(
        "manifest is a directory", damaged(lambda t: (t / "manifest.json").mkdir()), 3, "manifest.json cannot be read"
    ),
    Case(
        "manifest without shards' bytes", damaged(sealed(lambda e: e.pop("bytes"))), 3, "has a shard without path, by"
    ),
    Case("manifest of a list", damaged(sealed(lambda e: e.update(path=[]))), 3, "manifest.json"),
    Case(
        "manifest's shards a number",
        damaged(new("manifest.json", b'{"format": "sparktrain-tokens/1", "shards": 3}')),
        3,
        "manifest.json",
    ),
    Case("sha256 too short", damaged(sealed(lambda e: e.update(sha256="ab"))), 3, "has for shard .* sha256 'ab': make"),
    Case("sha256 in capitals", damaged(sealed(lambda e: e.update(sha256="A" * 64))), 3, "has for shard .* sha256 'AAA"),
    Case(
        "sha256 of another", damaged(sealed(lambda e: e.update(sha256="0" * 64))), 3, "sha256 .*, its manifest says 0"
    ),
    Case(
        "size of another", damaged(sealed(lambda e: e.update(bytes=7998))), 3, "has 8000 bytes, expected 7998 by its m"
    ),
    Case("size negative", damaged(number("-5")), 3, "manifest.json has for shard .* -5 bytes"),
    Case("size infinite", damaged(number("1e400")), 3, "manifest.json has a shard without path, bytes or sha256"),
    Case("size not whole", damaged(number("8000.5")), 3, "manifest.json has a shard without path, bytes or sha256"),
    Case("size beyond 64 bits", damaged(number(str(2**64))), 3, "has for shard .* 18446744073709551616 bytes"),
    Case("shard gone", damaged(sealed(lambda e: e.update(path="gone.ds"))), 3, "gone.ds is missing, yet its manifest"),
]


def megatron(change: Callable[[dict[str, Any]], Any]) -> Change:
    """A Megatron pair with a mistake in its index."""

    def make(train: Path) -> None:
        fields: dict[str, Any] = {"magic": b"MMIDIDX\0\0", "version": 1, "kind": 8, "sequences": 2, "entries": 2}
        fields |= {"lengths": [1000, 1000], "offsets": [0, 2000], "documents": [0, 2], "cut": None}
        change(fields)
        head = struct.pack("<9sQBQQ", *(fields[name] for name in ("magic", "version", "kind", "sequences", "entries")))
        parts = [("lengths", "<i4"), ("offsets", "<i8"), ("documents", "<i8")]
        content = head + b"".join(np.array(fields[name], kind).tobytes() for name, kind in parts)
        empty(train)
        (train / "m.bin").write_bytes(ids())
        (train / "m.idx").write_bytes(content[: fields["cut"]])

    return make


MEGATRON = [
    Case(f"Megatron {name}", damaged(megatron(lambda f, change=change: f.update(change))), 3, message)
    for name, change, message in [
        ("magic", {"magic": b"NOTTHIS\0\0"}, "m.idx"),
        ("version 2", {"version": 2}, "m.idx .*version|m.idx .*2"),
        ("of floats", {"kind": 6}, "m.idx .*f8|m.idx .*float|m.idx .*type"),
        ("of an unknown type", {"kind": 99}, "m.idx"),
        ("header torn", {"cut": 20}, "m.idx"),
        ("arrays torn", {"cut": 40}, "m.idx"),
        ("beyond the tokens", {"lengths": [1000, 2000]}, "m.idx"),
        ("with a gap", {"offsets": [0, 2002]}, "m.idx has sequence 1 of 1000 tokens at byte 2002"),
        ("without documents", {"entries": 0, "documents": []}, "m.idx"),
        ("documents that fall", {"entries": 3, "documents": [0, 2, 1]}, "m.idx"),
        ("counts that overflow", {"sequences": 2**63}, "m.idx"),
    ]
]


def parquet(**columns: Any) -> Change:
    return lambda train: (empty(train), pq.write_table(pa.table(columns), train / "p.parquet"))


ROWS = [list(range(33))] * 20
PARQUET = [
    Case(
        "Parquet without tokens", damaged(parquet(text=["a"])), 3, "p.parquet has no column inputs or input_ids, it ha"
    ),
    Case(
        "Parquet of strings", damaged(parquet(input_ids=[["a"]])), 3, "column input_ids of type .*, expected lists of"
    ),
    Case(
        "Parquet of lists of lists", damaged(parquet(input_ids=[[[1]]])), 3, "column input_ids of type .*, expected l"
    ),
    Case("Parquet of numbers", damaged(parquet(input_ids=[1, 2])), 3, "column input_ids of type int64, expected lists"),
    Case(
        "Parquet without rows", damaged(parquet(input_ids=pa.array([], pa.list_(pa.int32())))), 3, "it has no row: re"
    ),
    Case("Parquet ragged", damaged(parquet(input_ids=[[1, 2, 3], [4, 5]])), 3, "expected rows of equal length: pack"),
    Case(
        "Parquet ragged but even", damaged(parquet(input_ids=[[1] * 32, [4] * 34] * 10)), 3, "row 0 of 32 values, exp"
    ),
    Case(
        "Parquet with nulls", damaged(parquet(input_ids=[*ROWS, [None] * 33])), 3, "a row or value that is null: leave"
    ),
    Case(
        "Parquet's rows too long",
        damaged(parquet(input_ids=[list(range(40))] * 20)),
        3,
        "has rows of 40 tokens, a window has 33: set data.sequence_length to 39",
    ),
    Case(
        "Parquet over 2^31", damaged(parquet(input_ids=[*ROWS[1:], [2**31 + 7] * 33])), 3, "has token id 2147483655 at"
    ),
    Case(
        "Parquet's labels too short",
        damaged(parquet(input_ids=ROWS, labels=[[1] * 32] * 20)),
        3,
        "column labels, row 0 of 32 values, expected 33",
    ),
    Case(
        "Parquet's documents too long",
        damaged(parquet(input_ids=ROWS, sequence_lengths=[[20, 20]] * 20)),
        3,
        "p.parquet .*sequence_lengths",
    ),
    Case("Parquet padded", damaged(parquet(input_ids=ROWS, attention_mask=[[1] * 32 + [0]] * 20)), 3, "padding: pack"),
    Case(
        "Parquet's labels", damaged(parquet(input_ids=ROWS, labels=[[-7] * 33] * 20)), 3, "the value -7, expected 0 or"
    ),
    Case(
        "Parquet's footer torn",
        damaged(lambda t: (parquet(input_ids=ROWS)(t), edit(t / "p.parquet", lambda c: c[:-9]))),
        3,
        "p.parquet is no Parquet file that can be read",
    ),
]


def served(status: int) -> Callable[[Place], list[str]]:
    """jobs/train.py on a server that answers so."""

    def make(place: Place) -> list[str]:
        web = place.leave.enter_context(serve())
        web.fault = lambda n, path: status
        return swap(place.train(), "--data.path", f"{web.url}/d")

    return make


HTTP = [
    Case("HTTP 404", served(404), 3, r"/d cannot be listed: give \*.ds/.* files, one by one or as x-{0"),
    Case("HTTP 401", served(401), 3, r"may not be read \(HTTP 401\): .* SPARKTRAIN_TOKEN_127_0_0_1, which is not set"),
    Case(
        "HTTP 403 with a token",
        served(403),
        3,
        "SPARKTRAIN_TOKEN_127_0_0_1, which is set, does not admit to it; set it on driver and executors$",
        environment={"SPARKTRAIN_TOKEN_127_0_0_1": "hunter2"},
    ),
    Case("HTTP 418", served(418), 3, "d/manifest.json cannot be read: its server answers 418; check the address"),
]

CASES = [*SIMPLE, *MANIFESTS, *MEGATRON, *PARQUET, *HTTP]
