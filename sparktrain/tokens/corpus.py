"""Text files as documents: which there are, in which order, and which shard each goes to.

A document is named by its path relative to the corpus directory. Everything here is a function of those names and a
seed, so that the same corpus gives the same shards on any number of machines.
"""

import fnmatch
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from sparktrain.errors import ConfigError, DataError


@dataclass(frozen=True)
class Split:
    """Names in the order they are written. Train documents go round the shards: place i to shard i mod shards."""

    train: list[str]
    heldout: list[str]


def find(directory: Path, glob: str, exclude: tuple[str, ...], output: Path) -> list[str]:
    """Names of the files below ``directory`` that match ``glob``, without those in ``exclude`` and in ``output``.

    Listed here and not with Spark's file sources, as those leave out every name that begins with ``_`` or ``.``:
    ``__init__.py`` would be missing without a word.
    """
    if not directory.is_dir():
        raise ConfigError(f"input {directory} is no directory: give a directory with text files")
    skip = {*exclude}
    names = []
    for root, directories, files in os.walk(directory):
        here = Path(root)
        directories[:] = [d for d in directories if d not in skip and (here / d).resolve() != output]
        names += [
            (here / file).relative_to(directory).as_posix()
            for file in files
            if file not in skip and fnmatch.fnmatchcase(file, glob) and (here / file).is_file()
        ]
    if not names:
        raise DataError(f"input {directory} holds no file named {glob}: check input, glob and exclude")
    return names


def measure(directory: str, name: str) -> tuple[int, str]:
    """Bytes of a document (0: empty, -1: not UTF-8), and where it cannot be read, why."""
    try:
        content = Path(directory, name).read_bytes()
        content.decode()
    except UnicodeDecodeError:
        return -1, ""
    except OSError as error:
        return -1, error.strerror or str(error)
    return len(content), ""


def read(directory: str, name: str, characters: int = -1) -> str:
    """The text of a document, every character as it is in the file; at most so many ``characters``."""
    with open(Path(directory, name), encoding="utf-8", newline="") as file:
        return file.read(characters)


def split(names: list[str], seed: int, heldout_fraction: float, shards: int) -> Split:
    """Order documents by a hash of seed and name; the first are held out (one at least), the others trained on.

    Raises :class:`ConfigError` where there are fewer of these than ``shards``.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0".encode() + os.fsencode(name)).digest())
    heldout = max(1, round(len(ordered) * heldout_fraction)) if heldout_fraction else 0
    train = ordered[heldout:]
    if shards > len(train):
        raise ConfigError(
            f"shards is {shards}, but of {len(ordered)} documents {heldout} are held out and {len(train)} are left to "
            "train on: set a smaller shards or heldout_fraction, or give more files"
        )
    return Split(train, ordered[:heldout])
