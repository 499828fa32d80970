"""Every shard read once before training, by executors: what it holds, and whether it can be trained on."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import SparkSession

from sparktrain import tokens
from sparktrain.config import Data
from sparktrain.errors import DataError
from sparktrain.plan import count_microshards, window_length
from sparktrain.tokens import Shard

_INSPECTED = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("max_token", pa.int64()),
        pa.field("digest", pa.string()),
        pa.field("problem", pa.string()),
    ]
)
# Tokens looked at in one piece while a shard is checked: 32 MiB as int64.
_SCAN = 1 << 22


def index_shards(spark: SparkSession, directory: Path, token_size: int | None = None) -> list[tuple[Shard, int]]:
    """The shards in ``directory`` in order, each with its largest token id; read by executors, one task per shard.

    ``token_size`` is that of files that do not say it. Raises :class:`DataError` for the first shard that an executor
    cannot read or that is no shard, and for two with the same tokens.
    """
    paths = tokens.find_shards(directory)
    rows = (
        spark.createDataFrame([(path,) for path in paths], "path string")
        .repartition(min(len(paths), 4 * spark.sparkContext.defaultParallelism))
        .mapInArrow(
            partial(_inspect, token_size), "path string, shard string, max_token long, digest string, problem string"
        )
        .collect()
    )
    seen: dict[str, str] = {}
    for row in sorted(rows, key=lambda r: r.path):
        if row.problem:
            raise DataError(row.problem)
        if (first := seen.setdefault(row.digest, row.path)) != row.path:
            raise DataError(f"shards {first} and {row.path} hold the same tokens: remove one of them")
    return [(Shard.from_json(json.loads(r.shard)), r.max_token) for r in sorted(rows, key=lambda r: r.path)]


def check_shards(shards: Sequence[tuple[Shard, int]], data: Data, vocab_size: int, setting: str) -> None:
    """Raises :class:`DataError` for a shard without one whole sequence, cut into other rows than the windows of
    ``data``, or with a token id the model does not know; and where shards come from different tokenizers."""
    tokens.check_alike([shard for shard, _ in shards])
    length = window_length(data.window, data.sequence_length)
    for shard, max_token in shards:
        if shard.columns:
            raise DataError(
                f"shard {shard.path} comes with {', '.join(shard.columns)}, which training does not use yet: "
                "write it without, if its every token is to be predicted"
            )
        if shard.row_length not in (0, length):
            fitting = data.sequence_length + shard.row_length - length
            raise DataError(
                f"shard {shard.path} has rows of {shard.row_length} tokens, a window has {length}: "
                f"set data.sequence_length to {fitting}"
            )
        if count_microshards(shard, data.sequence_length) == 0:
            raise DataError(
                f"shard {shard.path} has {shard.num_tokens} tokens, fewer than one sequence of "
                f"{data.sequence_length} + 1: set data.sequence_length to at most {shard.num_tokens - 1} or remove the "
                f"shard from {setting}"
            )
        if max_token >= vocab_size:
            where = _first_at_least(shard, vocab_size)
            raise DataError(
                f"shard {shard.path} has token id {where[1]} at token {where[0]}, but the model's vocab_size is "
                f"{vocab_size}: use the tokenizer that the shards were made with or set model.sizes.vocab_size"
            )


def _inspect(token_size: int | None, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Runs in executors: each path's shard, largest token and digest, or what is wrong with it."""
    for batch in batches:
        for path in [str(value) for value in batch.column(0).to_pylist()]:
            row: dict[str, object] = {"path": path}
            try:
                shard = tokens.inspect(path, token_size)
                max_token, digest = _read(shard)
                row |= {"shard": json.dumps(asdict(shard)), "max_token": max_token, "digest": digest}
            except DataError as error:
                row |= {"problem": str(error)}
            yield pa.RecordBatch.from_pylist([row], schema=_INSPECTED)


def _pieces(shard: Shard) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    file, width = tokens.TokenFile(shard), shard.row_length or 1
    step = max(1, _SCAN // width) * width
    for start in range(0, shard.num_tokens, step):
        length = min(step, shard.num_tokens - start)
        # Of labels, that they are valid.
        yield start, file.window(start, length).tokens if shard.columns else file.read(start, length)
    file.close()


def _read(shard: Shard) -> tuple[int, str]:
    """Largest token, and a digest of all tokens whatever their format; what is read on the way is checked."""
    file = tokens.TokenFile(shard)
    file.document_ends()
    file.close()
    largest, digest = 0, sha256()
    for start, piece in _pieces(shard):
        if piece.min() < 0:
            at = int(np.argmax(piece < 0))
            raise DataError(f"shard {shard.path} has token id {piece[at]} at token {start + at}: write it again")
        largest = max(largest, here := int(piece.max()))
        digest.update(piece.astype("<u4").data if here < 2**32 else piece.data)
    return largest, digest.hexdigest()


def _first_at_least(shard: Shard, limit: int) -> tuple[int, int]:
    """Position and id of the first token >= ``limit``."""
    for start, piece in _pieces(shard):
        if (over := np.flatnonzero(piece >= limit)).size:
            return start + int(over[0]), int(piece[over[0]])
    raise DataError(f"shard {shard.path} changed while it was checked: start again when nothing writes to it")
