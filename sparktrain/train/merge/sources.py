"""Models on disk, read and written a piece at a time, so that memory does not grow with them.

A model is a Hugging Face directory (safetensors, in one file or several) or a parameter pack. Either is a set of flat
arrays at known places in files; a merged model has the files of the base it is merged from, with other numbers.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparktrain.errors import ModelError
from sparktrain.train.parameter_pack import read_manifest
from sparktrain.train.weight_files import weight_files

PIECE = 2**16
"""Coordinates read of each model at a time: half a megabyte per candidate in float64."""

_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# What goes with a model: configuration, tokenizer, template, card, license. Not weights in other formats, and not what
# else a checkpoint holds.
_BESIDE = {".json", ".txt", ".model", ".tiktoken", ".jinja", ".py", ".md", ""}


@dataclass(frozen=True)
class Part:
    """One tensor: ``size`` bytes at ``offset`` of ``file``. ``dtype`` is None where it is not floating-point."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path
    offset: int
    size: int

    @property
    def numel(self) -> int:
        return self.size // self.dtype.itemsize if self.dtype else 0

    def read(self, start: int, stop: int) -> Tensor:
        """Coordinates [start, stop) in float64, row-major."""
        assert self.dtype is not None
        width = self.dtype.itemsize
        raw = np.fromfile(self.file, np.uint8, (stop - start) * width, offset=self.offset + start * width)
        return torch.from_numpy(raw).view(self.dtype).to(torch.float64)


@dataclass(frozen=True)
class Source:
    """A model's floating-point tensors by name. ``identity``: what else must agree, of a pack its hashes."""

    path: Path
    floats: dict[str, Part]
    others: tuple[Part, ...]
    files: tuple[Path, ...]
    identity: dict[str, str]


def open_source(path: Path) -> Source:
    """The model at ``path``: a run directory with a trained model, a Hugging Face directory (which a checkpoint is,
    too) or a parameter pack.

    Raises :class:`ModelError` for anything else, and for files that are torn.
    """
    if (path / "manifest.json").exists() and not (path / "config.json").exists():
        manifest, values = read_manifest(path)
        part = Part(values.name, (manifest["parameter_count"],), torch.float32, values, 0, values.stat().st_size)
        hashes = {key: manifest[key] for key in ("layout_hash", "model_schema_hash")}
        return Source(path, {part.name: part}, (), (values,), hashes)
    directory = path / "model" if (path / "model" / "config.json").exists() else path
    files = weight_files(directory)
    parts = [part for file in files for part in _parts(file)]
    floats = {part.name: part for part in parts if part.dtype is not None}
    if not floats:
        raise ModelError(f"{path} has no floating-point tensors to merge: give a model directory or a parameter pack")
    return Source(directory, floats, tuple(p for p in parts if p.dtype is None), files, {})


def check_same(base: Source, other: Source) -> None:
    """Raises :class:`ModelError` naming what differs where ``other`` is not the same kind of model as ``base``."""
    if base.identity.keys() != other.identity.keys():
        raise ModelError(
            f"{base.path} and {other.path} are a parameter pack and a model directory: give models of one kind"
        )
    for key, value in other.identity.items():
        if value != base.identity[key]:
            raise ModelError(
                f"{other.path} has {key} {value}, but the base {base.path} has {base.identity[key]}: "
                "give packs of one model, written with one filter"
            )
    odd = sorted(base.floats.keys() ^ other.floats.keys())
    if odd:
        has, lacks = (other, base) if odd[0] in other.floats else (base, other)
        raise ModelError(f"{has.path} has {odd[0]}, but {lacks.path} does not: give candidates trained from the base")
    for name, part in base.floats.items():
        if part.shape != other.floats[name].shape:
            raise ModelError(
                f"{other.path} has {name} of shape {list(other.floats[name].shape)}, but the base {base.path} "
                f"{list(part.shape)}: give candidates trained from the base"
            )


def pieces(base: Source, models: Sequence[Source]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(tensor name, base [K], models [N, K]) for every piece of every floating-point tensor, in float64."""
    for name, part in base.floats.items():
        for start in range(0, part.numel, PIECE):
            stop = min(start + PIECE, part.numel)
            yield name, part.read(start, stop), torch.stack([m.floats[name].read(start, stop) for m in models])


def write_merged(
    output: Path, base: Source, models: Sequence[Source], combine: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """A model at ``output`` with the base's files and dtypes and ``combine(base [K], models [N, K])`` for values.

    Configuration, tokenizer and tensors that are not floating-point are the base's. It is there whole or not at all.
    """
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for beside in sorted(base.path.iterdir()):
            if beside.is_file() and beside.suffix in _BESIDE and not beside.name.startswith("."):
                shutil.copy(beside, temporary / beside.name)
        for file in base.files:  # the same size and header, then other numbers in the same places
            with file.open("rb") as old, (temporary / file.name).open("wb") as new:
                first = min(part.offset for part in [*base.floats.values(), *base.others] if part.file == file)
                new.write(old.read(first))
                new.truncate(file.stat().st_size)
        for part in base.others:
            _put(temporary / part.file.name, part.offset, np.fromfile(part.file, np.uint8, part.size, "", part.offset))
        at: dict[str, int] = {}
        for name, base_K, models_NK in pieces(base, models):
            part = base.floats[name]
            assert part.dtype is not None
            merged_K = combine(base_K, models_NK).to(part.dtype)
            if not merged_K.isfinite().all():
                raise ModelError(f"{name} of the merged model is not finite in {part.dtype}: nothing was written")
            _put(temporary / part.file.name, part.offset + at.get(name, 0), merged_K.view(torch.uint8).numpy())
            at[name] = at.get(name, 0) + merged_K.nbytes
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(file: Path, offset: int, raw: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
    with file.open("r+b") as out:
        out.seek(offset)
        out.write(raw.data)


def _parts(file: Path) -> Iterator[Part]:
    """The tensors of a safetensors file that is whole, in the order of their bytes."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        start, stop = entry["data_offsets"]
        dtype = _FLOATS.get(entry["dtype"])
        if dtype is None and entry["dtype"].startswith(("F", "BF")):
            raise ModelError(f"{file} has {name} of type {entry['dtype']}, which cannot be merged: convert it to BF16")
        yield Part(name, tuple(entry["shape"]), dtype, file, 8 + length + start, stop - start)
