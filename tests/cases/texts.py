"""Text that cannot be tokenized, and places where its tokens cannot go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparktrain.tokens import directory, tokenizer
from tests.cases import Case, Place


def text(*more: str) -> Callable[[Place], list[str]]:
    """jobs/tokenize.py on eleven documents and an empty one."""

    def make(place: Place) -> list[str]:
        for i in range(11):
            place.file(f"text/{i}.py", f"def function_{i}(): pass\n")
        place.file("text/empty.py", b"")
        place.file("text/latin.rs", "naïve".encode("latin-1"))
        return ["--input", str(place.inputs / "text"), "--output", str(place.out), *more]

    return make


def beside(change: Callable[[Place], Any], *more: str) -> Callable[[Place], list[str]]:
    """The same after ``change``; ``{inputs}`` in arguments is where that made things."""

    def make(place: Place) -> list[str]:
        change(place)
        return text(*(word.replace("{inputs}", str(place.inputs)) for word in more))(place)

    return make


def brought(**files: str) -> Callable[[Place], list[str]]:
    """With a tokenizer of which some files are others."""

    def change(place: Place) -> None:
        path = place.inputs / "t"
        path.mkdir()
        tokenizer.train(["text"], 258).save(path)
        for name, content in files.items():
            (path / f"{name}.json").write_text(content)

    return beside(change, "--tokenizer", "{inputs}/t")


def locked(place: Place) -> None:
    holder = {"host": "node7", "pid": 12, "since": "2026-01-01T00:00:00+00:00"}
    (place.root / ".out.LOCK").write_text(json.dumps(holder))


def torn(place: Place) -> None:
    """Made before, by these settings, and then a shard was lost."""
    text()(place)
    source = str((place.inputs / "text").resolve())
    values = {"input": source, "glob": "*.py", "exclude": ["site-packages", "__pycache__"], "tokenizer": None}
    values |= {"vocab_size": 4096, "sample_bytes": 8_000_000, "shards": 4, "heldout_fraction": 0.05, "seed": 0}
    entry = {"path": "train/a.ds", "bytes": 4}
    directory.claim(place.out)
    known: dict[str, Any] = {"tokenizer": {"sha256": ""}, "settings": values, "documents": {}, "shards": [entry]}
    directory.commit(place.out, known)


def other(place: Place) -> None:
    place.out.mkdir()
    (place.out / "novel.txt").write_text("x")


def foreign(place: Place) -> None:
    place.out.mkdir()
    (place.out / "manifest.json").write_text('{"format": "other"}')


CASES = [
    Case("no input", text("--input", "nowhere"), 2, "nowhere is no directory: give a directory", "tokenize"),
    Case(
        "input a file", beside(lambda p: p.file("x", "x"), "--input", "{inputs}/x"), 2, "x is no directory", "tokenize"
    ),
    Case("no such file", text("--glob", "*.tex"), 3, r"holds no file named \*.tex: check input, glob and", "tokenize"),
    Case("all empty", text("--glob", "empty.py"), 3, "all 1 files named empty.py are empty or not UTF-8", "tokenize"),
    Case("not UTF-8", text("--glob", "*.rs"), 3, r"all 1 files named \*.rs are empty or not UTF-8", "tokenize"),
    Case(
        "more shards than text", text("--shards", "11"), 2, "shards is 11, but of 11 documents 1 are held", "tokenize"
    ),
    Case("no shard", text("--shards", "0"), 2, "shards: input should be greater than or equal to 1", "tokenize"),
    Case("small vocabulary", text("--vocab-size", "257"), 2, "vocab_size: .* greater than or equal to 258", "tokenize"),
    Case("all held out", text("--heldout-fraction", "1"), 2, "heldout_fraction: .* less than 1", "tokenize"),
    Case("no tokenizer", text("--tokenizer", "nowhere"), 2, "nowhere holds no tokenizer.json: give a", "tokenize"),
    Case(
        "tokenizer of none", brought(tokenizer="{}"), 3, "tokenizer .*t cannot be loaded: .*; save it again", "tokenize"
    ),
    Case("tokenizer torn", brought(tokenizer='{"ver'), 3, "tokenizer .*t cannot be loaded: .*; save it", "tokenize"),
    Case("tokenizer's config torn", brought(tokenizer_config="{"), 3, "tokenizer .*t cannot be loaded: ", "tokenize"),
    Case("tokenizer without end", brought(tokenizer_config="{}"), 3, "has no end-of-document token: set", "tokenize"),
    Case("tokenizer's end unknown", brought(tokenizer_config='{"eos_token": "</s>"}'), 3, "no end-of-doc", "tokenize"),
    Case("output holds other things", beside(other), 2, "out holds something else, and no manifest.json", "tokenize"),
    Case("output of another tool", beside(foreign), 2, "out has a manifest.json that is not sparktrain-", "tokenize"),
    Case("output a file", text("--output", str(Path(__file__))), 2, "texts.py is a file: give a directory", "tokenize"),
    Case("output that cannot be", text("--output", "/proc/none/x"), 2, "output /proc/none/x cannot be", "tokenize"),
    Case("output below a file", text("--output", f"{__file__}/x"), 2, "output .* cannot be written: ", "tokenize"),
    Case("output in use", beside(locked), 5, "out is in use by process 12 on node7 since 2026-01-01", "tokenize"),
    Case("a shard was lost", beside(torn), 3, "train/a.ds is missing or torn, yet manifest.json knows it", "tokenize"),
    Case(
        "other settings",
        beside(torn, "--seed", "3"),
        2,
        "made with other settings: seed is 0 there, 3 here",
        "tokenize",
    ),
    Case("unknown option", text("--vocab", "3"), 2, "unknown option --vocab: did you mean --vocab_size", "tokenize"),
]
