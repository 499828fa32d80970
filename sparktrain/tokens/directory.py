"""A directory of token shards with its manifest: what jobs/tokenize.py leaves, found again, or told from other things.

::

    train/00000_00000_shuffled.ds ...   datatrove's layout (ds.py), .index and .metadata beside each
    heldout/00000_00000_shuffled.ds     documents kept out of training, where there are any
    tokenizer/                          Hugging Face tokenizer directory
    manifest.json                       what all of it is a function of; written last: without it, it is not complete
    INCOMPLETE                          from the start until the manifest is there: marks the directory as ours
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktrain.atomic import write_json
from sparktrain.errors import ConfigError, DataError
from sparktrain.tokens.sources.manifest import FORMAT

_MARKER = "INCOMPLETE"
_ELSEWHERE = "choose another output or remove it"


@dataclass(frozen=True)
class TokenDir:
    """A complete directory; ``fresh`` is False where it was there already."""

    path: Path
    manifest: dict[str, Any]
    fresh: bool

    def report(self) -> str:
        """A few lines for people."""
        documents, tokenizer, shards = (self.manifest[key] for key in ("documents", "tokenizer", "shards"))
        width = max(len(shard["path"]) for shard in shards)
        tokens = sum(shard["tokens"] for shard in shards)
        return "\n".join(
            [
                f"{self.path}: {'written' if self.fresh else 'already there with these settings, nothing to do'}",
                f"{'shard':<{width}} {'documents':>11} {'tokens':>15} {'bytes':>17}",
                *(f"{s['path']:<{width}} {s['documents']:>11,} {s['tokens']:>15,} {s['bytes']:>17,}" for s in shards),
                f"{documents['train']:,} documents to train on, {documents['heldout']:,} held out; "
                f"left out: {documents['not_utf8']:,} not UTF-8, {documents['empty']:,} empty",
                f"{tokens:,} tokens of {documents['bytes'] / tokens:.2f} bytes of text; "
                f"vocabulary {tokenizer['vocab_size']:,}, tokenizer sha256 {tokenizer['sha256'][:16]}",
            ]
        )


def check_parent(path: Path) -> None:
    """Make the directory that ``path`` is to be in; :class:`ConfigError` where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {path} cannot be written: {error.strerror}; choose another output") from None


def find(path: Path, settings: dict[str, Any], tokenizer_sha256: str | None) -> TokenDir | None:
    """The complete directory at ``path`` if ``settings`` made it, None where there is room for one.

    ``tokenizer_sha256`` is that of a tokenizer brought along. Raises :class:`ConfigError` where ``path`` holds
    something else, :class:`DataError` where a shard is gone.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output {path} is a file: give a directory")
    if not (path / "manifest.json").exists():
        if path.is_dir() and any(path.iterdir()) and not (path / _MARKER).exists():
            raise ConfigError(f"output {path} holds something else, and no manifest.json: {_ELSEWHERE}")
        return None
    manifest = _read(path / "manifest.json")
    known = manifest["settings"]
    changed = [f"{key} is {known.get(key)} there, {new} here" for key, new in settings.items() if known.get(key) != new]
    if tokenizer_sha256 not in (None, manifest["tokenizer"]["sha256"]):
        changed.append("the tokenizer has changed since")
    if changed:
        raise ConfigError(f"output {path} was made with other settings: {'; '.join(changed[:3])}: {_ELSEWHERE}")
    for shard in manifest["shards"]:
        file = path / shard["path"]
        if not file.is_file() or file.stat().st_size != shard["bytes"]:
            raise DataError(f"shard {file} is missing or torn, yet manifest.json knows it: remove {path} and run again")
    return TokenDir(path, manifest, fresh=False)


def claim(path: Path) -> None:
    """Make ``path`` ours; what an attempt that died left in it goes, as that may have had other settings."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / _MARKER).write_text("jobs/tokenize.py is at work here or was interrupted: run it again.\n")
        for part in ("train", "heldout", "tokenizer"):
            shutil.rmtree(path / part, ignore_errors=True)
            (path / part).mkdir()
    except OSError as error:
        raise ConfigError(f"output {path} cannot be written: {error.strerror}; choose another output") from error


def commit(path: Path, manifest: dict[str, Any]) -> TokenDir:
    """Make ``path`` complete. Attempts of tasks that died have left temporary files: they go."""
    for part in ("train", "heldout"):
        for leftover in (path / part).glob(".*.tmp"):
            leftover.unlink()
    if not any((path / "heldout").iterdir()):
        (path / "heldout").rmdir()
    manifest = {"format": FORMAT, **manifest}
    write_json(path / "manifest.json", manifest)
    (path / _MARKER).unlink()
    return TokenDir(path, manifest, fresh=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        manifest: Any = json.loads(file.read_bytes())
    except ValueError:
        manifest = None
    needed = {"settings", "tokenizer", "shards", "documents"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not needed <= manifest.keys():
        raise ConfigError(f"output {file.parent} has a manifest.json that is not {FORMAT}: {_ELSEWHERE}")
    return manifest
