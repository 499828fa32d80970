"""Text files to token shards, in parallel on Spark: the same bytes on any number of cores.

Three passes. Tasks measure every file, so that the driver knows names and sizes; the driver deals the documents to
shards and trains a tokenizer on a bounded sample; tasks encode, Spark sorts the tokens by shard and place in it, and
one task per shard writes. A task may be repeated: it writes the same bytes again, and a file appears by its rename.

Input and output are directories that driver and executors share. What is left there: ``tokens/directory.py``.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from pyspark import Broadcast, SparkContext
from pyspark.sql import SparkSession

from sparktrain.config import Section
from sparktrain.errors import DataError
from sparktrain.lock import hold
from sparktrain.spark.context import sparks_own
from sparktrain.tokens import corpus, directory, ds
from sparktrain.tokens.tokenizer import SMALLEST_VOCABULARY, TextTokenizer, load, train


class TokenizeConfig(Section):
    """Turn a directory of text files into token shards."""

    input: Path = Path(sysconfig.get_path("stdlib"))
    """Directory with the text files, at any depth; default: the standard library of this Python."""
    glob: str = "*.py"
    """Pattern of the file names to take."""
    exclude: tuple[str, ...] = ("site-packages", "__pycache__")
    """Names of files and directories to leave out."""
    output: Path = Path("data")
    """Directory for train/, heldout/, tokenizer/ and manifest.json. Every executor must be able to write it."""
    tokenizer: Path | None = None
    """Existing Hugging Face tokenizer directory (tokenizer.json, eos_token set); none: train a byte-level BPE."""
    vocab_size: int = Field(4096, ge=SMALLEST_VOCABULARY, le=2**24)
    """Tokens in the vocabulary that is trained."""
    sample_bytes: int = Field(8_000_000, ge=1)
    """Train the tokenizer on about so much of the training text."""
    shards: int = Field(4, ge=1, le=99_999)
    """Number of train shards."""
    heldout_fraction: float = Field(0.05, ge=0, lt=1)
    """Part of the documents that is kept out of training; 0: none."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds the order of the documents and the choice of the held-out ones."""


def tokenize(spark: SparkSession, config: TokenizeConfig, partitions: int = 0) -> directory.TokenDir:
    """Make ``config.output``, or find it made. ``partitions``: pieces the work is cut in; 0: four per core.

    Raises :class:`ConfigError` or :class:`DataError` with one line for what the user can mend.
    """
    context = sparks_own(spark, "tokenizing", "use spark-submit jobs/tokenize.py, on any machine")
    output = config.output.resolve()
    directory.check_parent(output)
    with hold(output.with_name(f".{output.name}.LOCK"), f"output {output}"):
        return _tokenize(context, config, output, partitions)


def _tokenize(context: SparkContext, config: TokenizeConfig, output: Path, partitions: int) -> directory.TokenDir:
    source = str(config.input.resolve())
    settings = _settings(config)
    brought = load(config.tokenizer) if config.tokenizer else None
    made = directory.find(output, settings, brought.sha256 if brought else None)
    if made:
        return made

    names = corpus.find(Path(source), config.glob, config.exclude, output)
    partitions = min(partitions or 4 * context.defaultParallelism, len(names))
    sizes = _measure(context, source, names, partitions)
    kept = [name for name, size in sizes.items() if size > 0]
    if not kept:
        raise DataError(f"input {source}: all {len(names)} files named {config.glob} are empty or not UTF-8")
    split = corpus.split(kept, config.seed, config.heldout_fraction, config.shards)
    chosen = brought or train(_sample(source, split.train, config.sample_bytes), config.vocab_size)

    directory.claim(output)
    chosen.save(output / "tokenizer")
    shards = {f"train/{i:05d}_00000_shuffled.ds": split.train[i :: config.shards] for i in range(config.shards)}
    if split.heldout:
        shards["heldout/00000_00000_shuffled.ds"] = split.heldout
    manifest = {
        "tokenizer": {"sha256": chosen.sha256, "vocab_size": chosen.vocab_size, "end_id": chosen.end_id},
        "token_size": ds.token_size_for(chosen.vocab_size),
        "settings": settings,
        "documents": {
            "train": len(split.train),
            "heldout": len(split.heldout),
            "empty": sum(size == 0 for size in sizes.values()),
            "not_utf8": sum(size < 0 for size in sizes.values()),
            "bytes": sum(sizes[name] for name in kept),
        },
        "shards": _write_shards(context, source, output, shards, chosen, partitions),
    }
    return directory.commit(output, manifest)


def _settings(config: TokenizeConfig) -> dict[str, Any]:
    """What the output is a function of."""
    absolute = {"input": config.input.resolve(), "tokenizer": config.tokenizer and config.tokenizer.resolve()}
    return config.model_copy(update=absolute).model_dump(mode="json", exclude={"output"})


def _measure(context: SparkContext, source: str, names: list[str], partitions: int) -> dict[str, int]:
    """Size of every document, in the terms of :func:`corpus.measure`."""
    sizes = {}
    for name, (size, reason) in context.parallelize(names, partitions).map(partial(_measure_one, source)).collect():
        if reason:
            raise DataError(f"input {source}/{name} cannot be read by a Spark task: {reason}; mend or exclude it")
        sizes[name] = size
    return sizes


def _measure_one(source: str, name: str) -> tuple[str, tuple[int, str]]:
    return name, corpus.measure(source, name)


def _sample(source: str, names: list[str], budget: int) -> Iterator[str]:
    """Text of the first documents, about ``budget`` bytes."""
    for name in names:
        if budget <= 0:
            return
        text = corpus.read(source, name, budget)
        budget -= len(text.encode())
        yield text


def _write_shards(
    context: SparkContext,
    source: str,
    output: Path,
    shards: dict[str, list[str]],
    chosen: TextTokenizer,
    partitions: int,
) -> list[dict[str, Any]]:
    """Encode and write ``shards`` (relative path to names of documents, in order); returns their manifest entries."""
    # By name: a task reads neighbouring files, and its tokens go to all shards alike.
    documents = sorted((name, shard, i) for shard, names in enumerate(shards.values()) for i, name in enumerate(names))
    files = context.broadcast(chosen.files)
    # datatrove names the tokenizer by its path here, which would make the bytes depend on where it lies.
    write = partial(_write, output, list(shards), chosen.vocab_size, f"sha256:{chosen.sha256}")
    entries: list[dict[str, Any]] = (
        context.parallelize(documents, partitions)
        .mapPartitions(partial(_encode, source, files))
        .repartitionAndSortWithinPartitions(len(shards), partitionFunc=itemgetter(0), keyfunc=itemgetter(1))
        .mapPartitionsWithIndex(write)
        .collect()
    )
    files.destroy()
    return entries


def _encode(
    source: str, files: Broadcast[dict[str, bytes]], documents: Iterable[tuple[str, int, int]]
) -> Iterator[tuple[tuple[int, int], bytes]]:
    """((shard, place), token ids in the shard's bytes) of each document."""
    chosen = TextTokenizer(files.value)
    token_type = f"<u{ds.token_size_for(chosen.vocab_size)}"
    for name, shard, place in documents:
        yield (shard, place), chosen.encode(corpus.read(source, name)).astype(token_type).tobytes()


def _write(
    output: Path,
    paths: list[str],
    vocab_size: int,
    tokenizer: str,
    shard: int,
    documents: Iterable[tuple[tuple[int, int], bytes]],
) -> Iterator[dict[str, Any]]:
    """Write one shard, whose documents come in order; yields its manifest entry."""
    path, token_type = output / paths[shard], f"<u{ds.token_size_for(vocab_size)}"
    ids = (np.frombuffer(content, token_type).astype(np.int64) for _, content in documents)
    written = ds.write(path, ids, vocab_size, tokenizer)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    yield {
        "path": paths[shard],
        "documents": Path(f"{path}.index").stat().st_size // 8,
        "tokens": written.num_tokens,
        "bytes": written.num_tokens * written.token_size,
        "sha256": digest,
    }
