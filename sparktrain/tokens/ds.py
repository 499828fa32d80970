"""datatrove's shard layout.

``X.ds``           tokens, little-endian uint16 or uint32, no header
``X.ds.index``     uint64 little-endian per document: its exclusive end, in tokens
``X.ds.metadata``  text: ``tokenizer|token_size``, token count, the same for people (``1.23 MT``)
``X.ds.loss``      one byte per token: 1 where it is a target, 0 where it is not

All but the first may be missing. A document's end may come twice: an empty one.

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


def inspect(source: Source, open_if_there: Opener, token_size: int | None) -> Shard | None:
    """The shard that ``source`` is; token size from its ``.metadata``, else ``token_size``, else 2."""
    path, num_bytes = source.uri, source.size()
    known_size, claimed, tokenizer = _read_metadata(path, open_if_there)
    if token_size and known_size and token_size != known_size:
        raise DataError(
            f"shard {path} has tokens of {known_size} bytes by its .metadata, data.token_size is {token_size}: "
            "leave data.token_size out, or write the shard again"
        )
    size = known_size or token_size or 2
    num_tokens = num_bytes // size
    if claimed is not None and claimed != num_tokens:
        raise DataError(
            f"shard {path} holds {num_tokens} tokens of {size} bytes, its .metadata says {claimed}: "
            "one of the two is from another file; write both again"
        )
    return Shard(
        path=path,
        num_tokens=num_tokens,
        token_size=size,
        format="ds",
        num_documents=_count_documents(path, num_tokens, open_if_there),
        tokenizer=tokenizer,
        columns=("labels",) if _has_loss(path, num_tokens, open_if_there) else (),
    )


def document_ends(shard: Shard, open_if_there: Opener) -> npt.NDArray[np.int64]:
    """Ends of the shard's documents in tokens, exclusive, ``[num_documents]``. Raises :class:`DataError` for an
    ``.index`` that does not rise."""
    source = open_if_there(f"{shard.path}.index")
    if source is None:
        raise DataError(f"{shard.path}.index is gone: it was there when the shard was inspected; restore it")
    ends = np.frombuffer(source.read(0, source.size()), dtype="<u8").astype(np.int64)
    source.close()
    falls = np.flatnonzero(np.diff(ends, prepend=0) < 0)
    if falls.size:
        i = int(falls[0])
        raise DataError(
            f"{shard.path}.index falls at byte {8 * i}: document {i} ends at token {ends[i]}, the one before it at "
            f"{ends[i - 1] if i else 0}; write it again"
        )
    return ends


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
    return Shard(str(path), total, token_size, "ds", num_documents=len(ends), tokenizer=tokenizer)


def _read_metadata(path: str, open_if_there: Opener) -> tuple[int | None, int | None, str]:
    """Token size, token count and tokenizer from the ``.metadata`` of ``path``; None where there is none."""
    file = f"{path}.metadata"
    source = open_if_there(file)
    if source is None:
        return None, None, ""
    lines = source.read(0, source.size()).decode(errors="replace").splitlines()
    source.close()
    tokenizer, _, size = lines[0].rpartition("|") if lines else ("", "", "")
    if size not in ("2", "4") or len(lines) < 2 or not lines[1].isdigit():
        raise DataError(
            f"{file} is not shard metadata: expected 'tokenizer|2' or 'tokenizer|4' and a token count, found "
            f"{' / '.join(lines[:2])!r}; write it again"
        )
    # What datatrove writes for a tokenizer without a name, its token size twice.
    known = not tokenizer.startswith("Unknown Tokenizer|")
    return int(size), int(lines[1]), tokenizer if known else ""


def _count_documents(path: str, num_tokens: int, open_if_there: Opener) -> int:
    """Documents in the ``.index`` of ``path``, of which only the last is read; 0 where there is none."""
    source = open_if_there(f"{path}.index")
    if source is None:
        return 0
    num_bytes = source.size()
    if num_bytes == 0 or num_bytes % 8:
        raise DataError(f"{path}.index has {num_bytes} bytes, not a positive multiple of 8: it is torn; write it again")
    last = int.from_bytes(source.read(num_bytes - 8, 8), "little")
    source.close()
    if last != num_tokens:
        raise DataError(
            f"{path}.index ends at token {last}, the shard has {num_tokens}: one of the two is from another file; "
            "write both again"
        )
    return num_bytes // 8


def _has_loss(path: str, num_tokens: int, open_if_there: Opener) -> bool:
    source = open_if_there(f"{path}.loss")
    if source is None:
        return False
    num_bytes = source.size()
    source.close()
    if num_bytes != num_tokens:
        raise DataError(
            f"{path}.loss has {num_bytes} bytes, the shard has {num_tokens} tokens: one of the two is from another "
            "file; write both again"
        )
    return True


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
