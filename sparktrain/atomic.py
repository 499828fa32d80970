"""Files that are there whole or not at all, also after a power cut; in an object store every one is."""

import io
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` under a temporary name first; what was there stays until all of it is on disk."""
    if not isinstance(path, Path):  # a Remote: storage.py
        path.write_bytes(content)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def show(path: Path, text: str) -> None:
    """Put ``text`` at ``path`` so that no reader sees half of it; after a power cut it may be gone."""
    temporary = path.with_suffix(".tmp") if isinstance(path, Path) else path
    temporary.write_text(text)
    if temporary is not path:
        temporary.replace(path)


def write_json(path: Path, values: Any) -> None:
    """``values`` as JSON, by :func:`write`."""
    write(path, (json.dumps(values, indent=2) + "\n").encode())


def write_table(path: Path, table: pa.Table) -> None:
    """``table`` as Parquet, by :func:`write`."""
    content = io.BytesIO()
    pq.write_table(table, content)
    write(path, content.getvalue())


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def sync_directory(path: Path) -> None:
    """Bring the names in ``path`` to disk, where the system can."""
    if not isinstance(path, Path):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
