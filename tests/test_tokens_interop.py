"""Shards that others wrote: datatrove's bytes as numbers, datatrove itself where installed, Psyche's shard where there.

``pip install -e .[interop]`` runs what is skipped without datatrove.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from sparktrain import plan, tokens
from sparktrain.plan import PlanSpec
from sparktrain.tokens import IGNORED, TokenFile
from tests.conftest import ROOT

# Written by datatrove 0.10.1's DocumentTokenizer with save_loss_metadata and MegatronDocumentTokenizer (vocabulary 512,
# end of text 511) of seven documents; the first is left out of the .ds, as nothing of it is a target.
DS = (
    "250030003b00460051005c00ff0194009f00aa00b500c000cb00d600ff014d01580163016e01790184018f019a01ff015c00670072007d008800"
    "93009e00a900b400ff01a901b401bf01ca01d501e001eb0102000d001800ff014c01570162016d01780183018e019901a401af01ba01ff01"
)
INDEX_ENDS = [0, 7, 15, 24, 34, 45, 57]
LOSS = (
    "000101010101010001010101010101000101010101010101000101010101010101010001010101010101010101000101010101010101010101"
)
METADATA = "tok|2\n57\n57.0 T"
FIRST = [0, 11, 22, 33, 44, 511]
IDX = (
    "4d4d494449445800000100000000000000080700000000000000080000000000000006000000070000000800000009000000"
    "0a0000000b0000000c00000000000000000000000c000000000000001a000000000000002a000000000000003c0000000000"
    "00005000000000000000660000000000000000000000000000000100000000000000020000000000000003000000000000000400000000000000"
    "050000000000000006000000000000000700000000000000"
)
# Psyche's own test shard (fineweb, Llama 2 tokens, no side files): beside a checkout, not in it.
SHA256 = "b649b5d781b1f94d"
FINEWEB = [p for p in (ROOT.parent / "shared").glob("reference/psyche/fineweb/*.ds") if p.is_file()]


def documents() -> list[list[int]]:
    """What the shards above were made of: squares and steps of eleven, then the end of text."""
    return [[*((i * i * 37 + j * 11) % 500 for j in range(5 + i)), 511] for i in range(7)]


def test_bytes_that_datatrove_wrote_are_read(tmp_path: Path) -> None:
    path = tmp_path / "00000_unshuffled.ds"
    path.write_bytes(bytes.fromhex(DS))
    Path(f"{path}.index").write_bytes(np.array(INDEX_ENDS, dtype="<u8").tobytes())
    Path(f"{path}.loss").write_bytes(bytes.fromhex(LOSS))
    Path(f"{path}.metadata").write_text(METADATA)
    shard = tokens.inspect(str(path))
    assert (shard.num_tokens, shard.token_size, shard.num_documents, shard.tokenizer) == (57, 2, 7, "tok")
    file, ids = TokenFile(shard), [t for document in documents()[1:] for t in document]
    assert file.read(0, 57).tolist() == ids
    assert file.document_ends().tolist() == [0, *np.cumsum([len(d) for d in documents()[1:]])]
    labels = file.window(0, 57).labels
    assert labels is not None
    starts = file.document_ends()[:-1].tolist()
    assert labels.tolist() == [IGNORED if i in starts else t for i, t in enumerate(ids)]


def test_the_megatron_bytes_that_datatrove_wrote_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(np.array(FIRST, dtype="<u2").tobytes() + bytes.fromhex(DS))
    (tmp_path / "m.idx").write_bytes(bytes.fromhex(IDX))
    file = TokenFile(tokens.inspect(str(tmp_path / "m.bin")))
    assert file.read(0, 63).tolist() == [t for document in documents() for t in document]
    assert file.document_ends().tolist() == np.cumsum([len(d) for d in documents()]).tolist()


@pytest.mark.parametrize(("vocab", "size"), [(512, 2), (70_000, 4)])
def test_shards_that_datatrove_writes_now_are_read(tmp_path: Path, vocab: int, size: int) -> None:
    data, writers = pytest.importorskip("datatrove.data"), pytest.importorskip("datatrove.pipeline.tokens")
    words = {f"w{i}": i for i in range(vocab - 1)} | {"[E]": vocab - 1}
    tokenizer = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    tokenizer.write_text(json.dumps(parts | content))
    ids = [[(i * 97 + j * 1009) % (vocab - 1) for j in range(20 + i)] for i in range(30)]

    def texts() -> list[object]:
        return [data.Document(text=" ".join(f"w{t}" for t in d), id=str(i)) for i, d in enumerate(ids)]

    common = {"tokenizer_name_or_path": str(tokenizer), "eos_token": "[E]"}
    writers.DocumentTokenizer(str(tmp_path / "a"), shuffle_documents=False, **common).run(texts(), 0, 1)
    writers.DocumentTokenizer(
        str(tmp_path / "b"), local_working_dir=str(tmp_path / "w"), shuffle_documents=True, seed=1, **common
    ).run(texts(), 0, 1)
    writers.MegatronDocumentTokenizer(str(tmp_path / "c"), **common).run(texts(), 0, 1)
    expected = [[*d, vocab - 1] for d in ids]
    for directory in ("a", "b", "c"):
        (path,) = tokens.find_shards(tmp_path / directory)
        shard = tokens.inspect(path)
        assert (shard.token_size, shard.num_documents) == (size, 30)
        assert shard.tokenizer == ("" if directory == "c" else str(tokenizer))
        file = TokenFile(shard)
        ends = file.document_ends().tolist()
        found = [file.read(a, b - a).tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        assert (sorted(found) if directory == "b" else found) == (sorted(expected) if directory == "b" else expected)
        assert (found != expected) == (directory == "b")


@pytest.mark.parametrize("path", FINEWEB)
@pytest.mark.parametrize(("window", "length"), [("psyche", 2048), ("overlap1", 2049)])
def test_psyches_own_shard_is_cut_as_psyche_cuts_it(path: Path, window: str, length: int) -> None:
    shard = tokens.inspect(str(path))
    assert (shard.format, shard.num_tokens, shard.token_size, shard.num_documents) == ("ds", 6144, 2, 0)
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith(SHA256)
    spec = PlanSpec((shard,), 2048, total_batch=2, steps=1, seed=0, window=window)
    rows = sorted(plan.rows(spec, 0, 2), key=lambda row: row.start)
    assert [(row.start, row.length) for row in rows] == [(0, length), (2048, length)]
    first, second = tokens.read_windows([(TokenFile(shard), row.start) for row in rows], length)
    assert first[:8].tolist() == [11566, 4757, 7255, 361, 441, 940, 5301, 360]
    assert (first[-1] == second[0]) == (window == "overlap1")
    # 13 is Llama 2's new line: as many as in the text that Psyche's test says its first sequence is.
    text = (path.parent / "sequence0.txt").read_text(encoding="utf-8")
    assert (first[:2048] == 13).sum() == text.count("\n") == 30
