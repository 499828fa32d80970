"""``manifest.json`` beside shards, as ``directory.py`` leaves it: what each must be, by size and sha256.

It lies in the directory of the shards or in the one above, names them relative to its own place, and is the list of
files where a server has none. One of another format is not ours and says nothing.
"""

import json
import re
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote

from sparktrain.errors import DataError
from sparktrain.tokens.source import Opener

FORMAT = "sparktrain-tokens/1"
_NAME = "manifest.json"
# Of a million shards; more is something else.
_MOST_BYTES = 256 << 20
_ENTRY = {"path": str, "bytes": int, "sha256": str}


class Known(NamedTuple):
    """What a shard must be: bytes and sha256; 0 and empty where it is not known."""

    num_bytes: int = 0
    sha256: str = ""


UNKNOWN = Known()


def promised(directory: str, opener: Opener) -> dict[str, Known]:
    """URIs of the shards in ``directory``, a URI or an absolute path, as a manifest promises them; empty without one.

    Raises :class:`DataError` for a manifest that is damaged or names a file outside its own directory.
    """
    directory = directory.rstrip("/")
    above, _, name = directory.rpartition("/")
    places = [directory]
    if name and above and not above.endswith("/"):  # of s3://bucket there is none
        places.append(above)
    for base in places:
        found = _read(f"{base}/{_NAME}", opener)
        inside = {uri: known for uri, known in found.items() if uri.rpartition("/")[0] == directory}
        if inside:
            return inside
    return {}


def promised_by_name(directory: str, opener: Opener) -> dict[str, Known]:
    """The same for shards that the user named one by one: stores that answer 403 for what is not there are common."""
    with suppress(DataError):
        return promised(directory, opener)
    return {}


def _read(uri: str, opener: Opener) -> dict[str, Known]:
    """The shards of the manifest at ``uri`` by their URIs."""
    source = opener(uri)
    if source is None:
        return {}
    if source.size() > _MOST_BYTES:
        raise DataError(f"{uri} has {source.size()} bytes: it is no manifest of shards; move it elsewhere")
    try:
        values = json.loads(source.read(0, source.size()))
    except (ValueError, RecursionError):
        raise DataError(f"{uri} is no JSON: it is torn; write it again or remove it") from None
    finally:
        source.close()
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        return {}
    base, found = uri.removesuffix(f"/{_NAME}"), {}
    if not isinstance(shards := values.get("shards", []), list):
        raise DataError(f"{uri} has no list of shards: make it again")
    for shard in shards:
        if not isinstance(shard, dict) or any(type(shard.get(key)) is not kind for key, kind in _ENTRY.items()):
            raise DataError(f"{uri} has a shard without path, bytes or sha256: make it again")
        path, known = shard["path"], Known(shard["bytes"], shard["sha256"])
        if _escapes(path):
            raise DataError(f"{uri} names the shard {path!r}, which is not inside its directory: do not trust it")
        if not 0 < known.num_bytes < 2**63 or not re.fullmatch(r"[0-9a-f]{64}", known.sha256):
            raise DataError(f"{uri} has for shard {path} {known.num_bytes} bytes, sha256 {known.sha256[:64]!r}: "
                            "make it again")  # fmt: skip
        found[f"{base}/{path}"] = known
    return found


def _escapes(path: str) -> bool:
    """Whether ``path``, as it is or once a server has decoded it, leads out of the directory it is relative to."""
    parts = [*path.split("/"), *re.split(r"[/\\]", unquote(path))]
    return any(part in ("", ".", "..") for part in parts) or "://" in path or "\0" in unquote(path)
