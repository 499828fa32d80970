"""Checkpoints on disk: parts written by the ranks, and a manifest that is written last.

::

    checkpoints/000000100-g000003/       parts; a Hugging Face model directory too
    checkpoints/000000100-g000003.json   manifest: sha256 and size of every part; without it there is no checkpoint
    checkpoints/000000100-g000003.pin    made by hand: never remove this one
    checkpoints/000000100-g000003.gone   in an object store: its parts are being removed

A name holds the step and the attempt, so none is written twice. Manifests stay when their parts are removed: the
chain of their parents is the run's history, and says which attempt's steps count.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparktrain import failpoints, storage
from sparktrain.atomic import read_json, sync_directory, write, write_json
from sparktrain.errors import LaunchError, ModelError


@dataclass(frozen=True)
class Part:
    """A file of a checkpoint: its content's sha256 and its size."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class Manifest:
    """A checkpoint that exists.

    Args:
        step: steps that were done, which is the number of the next one.
        parent: the checkpoint before it; None: the first.
        world: ranks that wrote it.
        parts: by path below the run directory.
        values: plain values that the run goes on with.
        run_id: of the run that wrote it; empty where that was not said.
    """

    name: str
    step: int
    generation: int
    parent: str | None
    world: int
    parts: dict[str, Part]
    values: dict[str, Any]
    run_id: str = ""


class Checkpoints:
    """Those of the run directory ``run_dir``. Making the object touches nothing."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "checkpoints"

    def directory(self, name: str) -> Path:
        return self.path / name

    def write_part(self, file: Path, content: bytes, like: Manifest | None) -> dict[str, Part]:
        """Write one part; where checkpoint ``like`` has the same content under the same name, link it instead."""
        part = Part(hashlib.sha256(content).hexdigest(), len(content))
        file.parent.mkdir(parents=True, exist_ok=True)
        if like and self._linked(file, part, like):
            return {str(file.relative_to(self.run_dir)): part}
        if not storage.is_local(file):
            write(file, content)
        else:
            with open(file, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
        return {str(file.relative_to(self.run_dir)): part}

    def seal(self, name: str, rank: int, parts: Mapping[str, Part]) -> None:
        """Say that all parts of ``rank`` are on disk."""
        write_json(self._seal(name, rank), {path: asdict(part) for path, part in parts.items()})

    def commit(self, manifest: Manifest, seconds: float) -> Manifest:
        """Wait until every rank has sealed its parts, then write the manifest: from here on the checkpoint exists."""
        deadline, parts = time.monotonic() + seconds, dict[str, Part]()
        seals = [self._seal(manifest.name, rank) for rank in range(manifest.world)]
        for rank, seal in enumerate(seals):
            while not seal.exists():
                if time.monotonic() > deadline:
                    raise LaunchError(f"checkpoint {manifest.name}: rank {rank} did not write its part in {seconds} s")
                time.sleep(0.01 if storage.is_local(seal) else 0.2)
            parts |= {path: Part(**part) for path, part in json.loads(seal.read_text()).items()}
        for path, part in parts.items():
            if (found := (self.run_dir / path).stat().st_size) != part.num_bytes:
                raise LaunchError(
                    f"checkpoint {manifest.name}: {path} has {found} bytes, {part.num_bytes} were written"
                )
        complete = Manifest(**vars(manifest) | {"parts": parts})
        sync_directory(self.directory(manifest.name))
        failpoints.reach("checkpoint.manifest", step=manifest.step, generation=manifest.generation)
        write_json(self._manifest(manifest.name), asdict(complete))
        for seal in seals:
            seal.unlink()
        return complete

    def run_id(self) -> str:
        """Of the run that these are of; empty where it has none."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(read_json(self.run_dir / "run.json")["run_id"])
        return ""

    def read(self, name: str) -> Manifest:
        """The manifest of ``name``. Raises :class:`ModelError` where there is none or it cannot be read."""
        try:
            values = json.loads(self._manifest(name).read_text(encoding="utf-8"))
            return Manifest(**values | {"parts": {path: Part(**part) for path, part in values["parts"].items()}})
        except (OSError, ValueError, TypeError, KeyError) as error:
            storage.check_told(self.run_dir, error)
            raise ModelError(f"checkpoint {name} of {self.run_dir} has no readable manifest: {error}") from None

    def check_own(self, manifest: Manifest) -> None:
        """Raises :class:`ModelError` for a checkpoint of another run."""
        name, run, own = manifest.name, manifest.run_id, self.run_id()
        if own and run not in ("", own):
            where = f"checkpoint {name} of {self.run_dir}"
            raise ModelError(f"{where} is of another run, {run}, this one is {own}: take it and its manifest out")

    def newest(self) -> tuple[Manifest | None, list[str]]:
        """The newest checkpoint all of whose parts are whole, and what is wrong with each newer one. Raises
        :class:`ModelError` for one of another run."""
        damages = []
        for name in self.names():
            try:
                manifest = self.read(name)
            except ModelError as error:
                damages.append(str(error))
                continue
            self.check_own(manifest)
            if (damage := self.damage(manifest)) is None:
                return manifest, damages
            damages.append(f"checkpoint {name} is damaged: {damage}")
        return None, damages

    def latest_step(self) -> int:
        """Steps of the newest checkpoint, whole or not; 0 before the first."""
        return max((_step_of(name) for name in self.names()), default=0)

    def damage(self, manifest: Manifest) -> str | None:
        """What is wrong with the parts of a checkpoint; None: nothing."""
        for path, part in manifest.parts.items():
            file = self.run_dir / path
            if Path(path).is_absolute() or ".." in Path(path).parts:
                return f"{path} is outside the run directory"
            if (found := storage.size(file)) is None:
                return f"{path} is missing"
            if found != part.num_bytes:
                return f"{path} has {found} bytes, expected {part.num_bytes}"
            if sha256_of(file) != part.sha256:
                return f"{path} has another content than was written"
        return None

    def lineage(self, name: str | None) -> list[Manifest]:
        """The checkpoints that led to ``name`` and itself, oldest first: the steps before each are its attempt's."""
        chain: list[Manifest] = []
        while name is not None:
            chain.append(self.read(name))
            name = chain[-1].parent
        return chain[::-1]

    def retain(self, keep_last: int, keep_every: int) -> None:
        """Remove the parts of all but the last ``keep_last``, those at multiples of ``keep_every`` steps (0: none)
        and pinned ones. Manifests and what lies outside the checkpoint's directory stay."""
        for name in self.names()[keep_last:]:
            kept = keep_every and _step_of(name) % keep_every == 0
            if not kept and not (self.path / f"{name}.pin").exists():
                self._remove(name)

    def sweep(self) -> None:
        """Remove what was begun and never committed. Only at the start of an attempt, which is the only writer."""
        known = set(self.names())
        for name, is_directory in storage.entries(self.path).items():
            if is_directory and name not in known:
                self._remove(name)
            elif name.endswith(".tmp"):  # a manifest, half written
                (self.path / name).unlink(missing_ok=True)
        for name in known:  # of one that was committed and then killed
            for file in storage.entries(self.directory(name)):
                if file.startswith(".rank-") and file.endswith(".json"):
                    (self.directory(name) / file).unlink()

    def names(self) -> list[str]:
        """Checkpoints with a manifest and parts, newest first."""
        inside = storage.entries(self.path)
        manifests = [name.removesuffix(".json") for name in inside if "-g" in name and name.endswith(".json")]
        names = [name for name in manifests if inside.get(name) and f"{name}.gone" not in inside]
        return sorted(names, key=lambda name: (_generation_of(name), _step_of(name)), reverse=True)

    def _manifest(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def _seal(self, name: str, rank: int) -> Path:
        return self.directory(name) / f".rank-{rank:05d}.json"

    def _remove(self, name: str) -> None:
        storage.discard(self.directory(name))  # at once: nobody sees a checkpoint that is half removed

    def _linked(self, file: Path, part: Part, like: Manifest) -> bool:
        same = self.directory(like.name) / file.name
        if like.parts.get(str(same.relative_to(self.run_dir))) != part:
            return False
        with contextlib.suppress(OSError):  # removed meanwhile, or a file system without links
            storage.copy(same, file)
            return True
        return False


def name_of(step: int, generation: int) -> str:
    return f"{step:09d}-g{generation:06d}"


def sha256_of(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def parts_of(run_dir: Path, files: Iterable[Path], below: str = "") -> dict[str, Part]:
    """Files that somebody else has written, as parts; brought to disk. ``below``: where they will be in the run
    directory, if not there already."""
    parts = {}
    for file in files:
        if storage.is_local(file):
            with open(file, "rb") as content:
                os.fsync(content.fileno())
        parts[f"{below}{file.relative_to(run_dir)}"] = Part(sha256_of(file), file.stat().st_size)
    return parts


def _step_of(name: str) -> int:
    return int(name.partition("-g")[0])


def _generation_of(name: str) -> int:
    return int(name.partition("-g")[2])
