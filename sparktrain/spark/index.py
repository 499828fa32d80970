"""Every shard read once before training, by executors: what it holds, and whether it can be trained on."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyspark.sql import SparkSession

from sparktrain import tokens
from sparktrain.config import Data
from sparktrain.errors import DataError
from sparktrain.plan import count_microshards, window_length
from sparktrain.spark.context import parallelism
from sparktrain.tokens import Known, Shard
from sparktrain.tokens.source import Opener
from sparktrain.tokens.sources import is_local, open_source, reach, sha256_of

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
# Bytes of shards that are read in less time than Spark needs to start its Python.
_QUICK = 64 << 20


def locate(data: Data) -> dict[str, dict[str, Known]]:
    """The shards that ``data`` names, by the setting that names them: each source's, and the held-out ones.

    Raises :class:`DataError` where there are none, and for one that two sources have.
    """
    opener, located, owners = reach.opener(data, {}), {}, dict[str, str]()
    for setting, where in {**data.trained_on, **({"data.heldout": data.heldout} if data.heldout else {})}.items():
        try:
            located[setting] = tokens.locate_shards(where, opener)
        except DataError as error:
            raise DataError(f"{setting}: {error}") from None
    for setting in data.trained_on:
        for path in located[setting]:
            if (owner := owners.setdefault(path, setting)) != setting:
                raise DataError(f"shard {path} is in {owner} and in {setting}: leave it in one of them")
    return located


def read_shards(
    spark: SparkSession, located: Mapping[str, Mapping[str, Known]], data: Data, here: bool = False
) -> dict[str, list[tuple[Shard, int]]]:
    """What :func:`locate` found, read and checked, each shard with its largest token id: all sources in one job, as
    none may have the tokens of another.

    Raises like :func:`index_shards` and :func:`check_shards`.
    """
    read: dict[str, tuple[Shard, int]] = {}
    for settings in (data.trained_on.keys(), located.keys() - data.trained_on.keys()):
        if together := {path: known for setting in settings for path, known in located[setting].items()}:
            read |= {shard.path: (shard, largest) for shard, largest in index_shards(spark, together, data, here)}
    for setting, paths in located.items():
        check_shards([read[path] for path in paths], data, setting)
    tokens.check_alike([shard for shard, _ in read.values()])
    return {setting: [read[path] for path in paths] for setting, paths in located.items()}


def is_quick(located: Iterable[str]) -> bool:
    """Whether the shards ``located`` are of this machine and soon read."""
    if not all(is_local(uri) for uri in located):
        return False
    total = 0
    for uri in located:
        with closing(open_source(uri)) as source:
            total += source.size()
    return total <= _QUICK


def index_shards(
    spark: SparkSession, located: Mapping[str, Known], data: Data, here: bool = False
) -> list[tuple[Shard, int]]:
    """The shards ``located`` (:func:`sparktrain.tokens.locate_shards`) in order, each with its largest token id; read
    as ``data`` says by executors, one task per shard, or ``here``, by this process.

    Raises :class:`DataError` for the first shard that an executor cannot read, that is no shard or not the one its
    manifest knows, and for two with the same tokens.
    """
    asked = [{"path": path, "size": known.num_bytes, "hash": known.sha256} for path, known in located.items()]
    if here:
        found = [row for batch in _inspect(data, [pa.RecordBatch.from_pylist(asked)]) for row in batch.to_pylist()]
    else:
        found = [
            row.asDict()
            for row in spark.createDataFrame(
                [tuple(row.values()) for row in asked], "path string, size long, hash string"
            )
            .repartition(min(len(located), 4 * parallelism(spark)))
            .mapInArrow(
                partial(_inspect, data), "path string, shard string, max_token long, digest string, problem string"
            )
            .collect()
        ]
    seen: dict[str, str] = {}
    rows = sorted(found, key=itemgetter("path"))
    for row in rows:
        if row["problem"]:
            raise DataError(row["problem"])
        if (first := seen.setdefault(row["digest"], row["path"])) != row["path"]:
            raise DataError(f"shards {first} and {row['path']} hold the same tokens: remove one of them")
    return [(Shard.from_json(json.loads(row["shard"])), row["max_token"]) for row in rows]


def check_shards(shards: Sequence[tuple[Shard, int]], data: Data, setting: str) -> None:
    """Raises :class:`DataError` for a shard without one whole sequence, or cut into other rows than the windows of
    ``data``; and where shards come from different tokenizers."""
    tokens.check_alike([shard for shard, _ in shards])
    length = window_length(data.window, data.sequence_length)
    for shard, _ in shards:
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


def check_vocabulary(shards: Sequence[tuple[Shard, int]], data: Data, vocab_size: int) -> None:
    """Raises :class:`DataError` for a shard with a token id the model does not know, saying where."""
    for shard, max_token in shards:
        if max_token >= vocab_size:
            where = _first_at_least(shard, vocab_size, reach.opener(data, reach.known([shard])))
            raise DataError(
                f"shard {shard.path} has token id {where[1]} at token {where[0]}, but the model's vocab_size is "
                f"{vocab_size}: use the tokenizer that the shards were made with or set model.sizes.vocab_size"
            )


def _inspect(data: Data, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Runs in executors: each path's shard, largest token and digest, or what is wrong with it."""
    located: dict[str, Known] = {}
    opener = None
    for batch in batches:
        for path, size, hash_ in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            row: dict[str, object] = {"path": path}
            try:
                opener = opener or reach.opener(data, located)
                located[path] = Known(size or open_source(path, opener).size(), hash_)
                shard = tokens.inspect(path, data.token_size, opener, located[path])
                max_token, digest, found = _read(shard, opener)
                if not found and (shard.sha256 or data.cache_dir):
                    found = sha256_of(path, shard.num_bytes, opener)
                if shard.sha256 not in ("", found):
                    raise DataError(
                        f"shard {path} has sha256 {found}, its manifest says {shard.sha256}: it was changed or "
                        "damaged; restore it or make the manifest again"
                    )
                row |= {"shard": json.dumps(asdict(replace(shard, sha256=found)))}
                row |= {"max_token": max_token, "digest": digest}
            except DataError as error:
                row |= {"problem": str(error)}
            yield pa.RecordBatch.from_pylist([row], schema=_INSPECTED)


def _pieces(shard: Shard, opener: Opener) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    file, width = tokens.TokenFile(shard, opener), shard.row_length or 1
    step = max(1, _SCAN // width) * width
    for start in range(0, shard.num_tokens, step):
        length = min(step, shard.num_tokens - start)
        # Of labels, that they are valid.
        yield start, file.window(start, length).tokens if shard.columns else file.read(start, length)
    file.close()


def _read(shard: Shard, opener: Opener) -> tuple[int, str, str]:
    """Largest token, a digest of all tokens whatever their format, and the file's sha256, empty where the file has
    more than tokens; what is read on the way is checked."""
    file = tokens.TokenFile(shard, opener)
    file.document_ends()
    file.close()
    largest, digest, stored = 0, sha256(), sha256()
    bare = shard.num_bytes == shard.num_tokens * shard.token_size  # tokens and nothing else: read once for both
    for start, piece in _pieces(shard, opener):
        if piece.min() < 0:
            at = int(np.argmax(piece < 0))
            raise DataError(f"shard {shard.path} has token id {piece[at]} at token {start + at}: write it again")
        largest = max(largest, here := int(piece.max()))
        digest.update(piece.astype("<u4").data if here < 2**32 else piece.data)
        if bare:
            stored.update(piece.astype(f"<u{shard.token_size}").data)
    return largest, digest.hexdigest(), stored.hexdigest() if bare else ""


def _first_at_least(shard: Shard, limit: int, opener: Opener) -> tuple[int, int]:
    """Position and id of the first token >= ``limit``."""
    for start, piece in _pieces(shard, opener):
        if (over := np.flatnonzero(piece >= limit)).size:
            return start + int(over[0]), int(piece[over[0]])
    raise DataError(f"shard {shard.path} changed while it was checked: start again when nothing writes to it")
