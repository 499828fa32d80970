"""datatrove's shard layout.

``X.ds``           tokens, little-endian uint16 or uint32, no header
``X.ds.index``     uint64 little-endian per document: its exclusive end, in tokens
``X.ds.metadata``  text: ``tokenizer|token_size``, token count, the same for people (``1.23 MT``)

Layout as written by datatrove's ``DocumentTokenizer`` (github.com/huggingface/datatrove).
"""

import uuid
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparktrain.errors import DataError
from sparktrain.tokens.shard import Shard
from sparktrain.tokens.source import Opener, Source


def token_size_for(vocab_size: int) -> int:
    """Bytes per token that datatrove chooses: 2 up to a vocabulary of 65,536."""
    return 2 if vocab_size <= 2**16 else 4


def inspect(source: Source, open_if_there: Opener) -> Shard:
    """The shard that ``source`` is; token size from its ``.metadata``, or 2 where there is none."""
    path, num_bytes = source.uri, source.size()
    token_size, claimed = _read_metadata(path, open_if_there)
    if num_bytes == 0:
        raise DataError(f"shard {path} is empty: remove it or write it again")
    if num_bytes % token_size:
        raise DataError(
            f"shard {path} has {num_bytes} bytes, not a multiple of its token size {token_size}: "
            "it is torn or its token size is wrong; write it again"
        )
    num_tokens = num_bytes // token_size
    if claimed is not None and claimed != num_tokens:
        raise DataError(
            f"shard {path} holds {num_tokens} tokens of {token_size} bytes, its .metadata says {claimed}: "
            "one of the two is from another file; write both again"
        )
    return Shard(path, num_tokens, token_size)


def write(path: Path, documents: Iterable[npt.NDArray[np.int64]], vocab_size: int, tokenizer: str) -> Shard:
    """Write ``documents`` (token ids, int64 ``[length]``) as ``path`` with its two side files, each by rename.

    Written under a temporary name first: a task that dies leaves no file that looks like a shard, and a task that
    is repeated writes the same bytes again.
    """
    token_size = token_size_for(vocab_size)
    temporary = _temporary(path)
    ends, total = [], 0
    with open(temporary, "wb") as file:
        for ids in documents:
            file.write(ids.astype(f"<u{token_size}").tobytes())
            total += len(ids)
            ends.append(total)
    _replace(Path(f"{path}.index"), np.array(ends, dtype="<u8").tobytes())
    _replace(Path(f"{path}.metadata"), f"{tokenizer}|{token_size}\n{total}\n{_humanize(total)}".encode())
    temporary.replace(path)
    return Shard(str(path), total, token_size)


def _read_metadata(path: str, open_if_there: Opener) -> tuple[int, int | None]:
    """Token size and token count from the ``.metadata`` of ``path``; (2, None) where there is none."""
    file = f"{path}.metadata"
    source = open_if_there(file)
    if source is None:
        return 2, None
    lines = source.read(0, source.size()).decode(errors="replace").splitlines()
    source.close()
    size = lines[0].rpartition("|")[2] if lines else ""
    if size not in ("2", "4") or len(lines) < 2 or not lines[1].isdigit():
        raise DataError(
            f"{file} is not shard metadata: expected 'tokenizer|2' or 'tokenizer|4' and a token count, found "
            f"{' / '.join(lines[:2])!r}; write it again"
        )
    return int(size), int(lines[1])


def _replace(path: Path, content: bytes) -> None:
    temporary = _temporary(path)
    temporary.write_bytes(content)
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    # Not by process id: attempts of one task on two machines, in containers above all, may have the same.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _humanize(count: int) -> str:
    """Three digits and an SI prefix, as datatrove's ``humanize.metric(count, unit="T")``."""
    count = round(count, 3 - len(str(count)))
    exponent = len(str(count)) - 1
    prefix = ("", "k", "M", "G", "T", "P")[exponent // 3]
    return f"{count / 1000 ** (exponent // 3):.{2 - exponent % 3}f} {prefix}T"
