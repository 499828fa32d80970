"""Writing and reading packs: whole or not at all, straight between tensors and the file."""

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparktrain import atomic
from sparktrain.errors import ModelError
from sparktrain.train.parameter_pack.layout import ALL, Layout, StateDictFilter, entries_of, layout_of, ties_of

FORMAT = "burn-p2p-python-flattened-parameter-pack-v1"
VALUES = "values.f32le"


@dataclass(frozen=True)
class Pack:
    """A pack that was read. ``values``: float32 [parameter_count]; ``manifest``: all of it, as it was found."""

    path: Path
    layout_hash: str
    model_schema_hash: str
    values: "np.ndarray[Any, np.dtype[np.float32]]"
    manifest: dict[str, Any]


def write(path: Path, state: Any, model_schema_hash: str, filter: StateDictFilter = ALL) -> Layout:
    """Write ``state`` as a pack at ``path``. A reader sees the whole pack or none: the manifest comes last."""
    entries = entries_of(state)
    made = layout_of(entries, filter)
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / f".{VALUES}.{uuid.uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            for key in made.included_keys:
                flat = entries[key].detach().to("cpu", torch.float32).contiguous().numpy()
                file.write(flat.astype("<f4", copy=False).data)
        (path / "manifest.json").unlink(missing_ok=True)  # what it describes is about to change
        temporary.replace(path / VALUES)
    finally:
        temporary.unlink(missing_ok=True)
    manifest = {
        "format": FORMAT,
        "model_schema_hash": model_schema_hash,
        "layout_hash": made.layout_hash,
        "parameter_count": made.parameter_count,
        "values_f32_le": VALUES,
        "state_dict_filter": filter.to_json(),
        "included_keys": made.included_keys,
        "excluded_float_keys": made.excluded_float_keys,
        "ignored_non_float_keys": made.ignored_non_float_keys,
    }
    write_json(path / "manifest.json", manifest)
    return made


def read(path: Path) -> Pack:
    """The pack at ``path``; raises :class:`ModelError` for a pack that is incomplete, torn or of another format."""
    manifest, values = read_manifest(path)
    flat = np.fromfile(values, dtype="<f4").astype(np.float32, copy=False)
    return Pack(path, manifest["layout_hash"], manifest["model_schema_hash"], flat, manifest)


def read_manifest(path: Path) -> tuple[dict[str, Any], Path]:
    """A pack's manifest and the file of its values, checked against each other without reading the values."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} is no parameter pack: it has no manifest.json, which is written last") from None
    except ValueError as error:
        raise ModelError(f"parameter-pack manifest {file} is not valid JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise ModelError(f"{path} has parameter-pack format {found!r}: this sparktrain reads {FORMAT!r}")
    kinds = {"model_schema_hash": str, "layout_hash": str, "parameter_count": int, "values_f32_le": str}
    for key, kind in kinds.items():
        if type(manifest.get(key)) is not kind:
            raise ModelError(f"parameter-pack manifest {file} has {key} {manifest.get(key)!r}: expected {_NAMES[kind]}")
    name, count = manifest["values_f32_le"], manifest["parameter_count"]
    if name in ("", ".", "..") or Path(name).name != name:
        raise ModelError(f"parameter-pack manifest {file} names values {name!r}: expected a file beside it")
    values = path / name
    if not values.is_file():
        raise ModelError(f"parameter pack {path} has no {name}: it was not copied whole")
    if values.stat().st_size != 4 * count:
        raise ModelError(
            f"parameter-pack byte length {values.stat().st_size} of {values} does not match parameter count {count}: "
            f"expected {4 * count} bytes"
        )
    return manifest, values


def unpack(pack: Pack, state: Any, filter: StateDictFilter = ALL) -> dict[str, torch.Tensor]:
    """The pack's tensors by name, float32, shaped as in ``state``: views of ``pack.values``.

    Raises :class:`ModelError` where the pack was made of another model or with another filter, naming what differs,
    and where two names of one tied weight have different values.
    """
    entries = entries_of(state)
    expected = layout_of(entries, filter)
    if pack.layout_hash != expected.layout_hash:
        raise ModelError(
            f"parameter-pack layout {pack.layout_hash} of {pack.path} does not match model layout "
            f"{expected.layout_hash}: {_difference(pack, expected)}"
        )
    if pack.values.size != expected.parameter_count:  # a manifest that lies about its layout
        raise ModelError(
            f"parameter pack {pack.path} has {pack.values.size} values, its layout has {expected.parameter_count}: "
            "it was not written by a parameter-pack writer"
        )
    tensors: dict[str, torch.Tensor] = {}
    flat, at = torch.from_numpy(pack.values), 0
    for key in expected.included_keys:
        like = entries[key]
        tensors[key] = flat[at : at + like.numel()].view(like.shape)
        at += like.numel()
    for first, second in ties_of({key: entries[key] for key in tensors}):
        if not np.array_equal(tensors[first].numpy().view(np.uint32), tensors[second].numpy().view(np.uint32)):
            raise ModelError(
                f"parameter pack {pack.path} has different values for {first} and {second}, which the model ties: "
                f"leave one out with state_dict_filter.exclude_globs, or train them as one"
            )
    return tensors


def load(path: Path, state: Any, filter: StateDictFilter = ALL) -> Pack:
    """Copy the pack at ``path`` into ``state``'s tensors, cast to each one's dtype; everything else stays as it is."""
    pack = read(path)
    entries = entries_of(state)
    with torch.no_grad():
        for key, values in unpack(pack, state, filter).items():
            entries[key].copy_(values)
    return pack


def write_json(path: Path, values: Any) -> None:
    """Write JSON to the byte as the reference does."""
    atomic.write(path, json.dumps(values, indent=2).encode())


_NAMES = {str: "a string", int: "a whole number"}


def _difference(pack: Pack, expected: Layout) -> str:
    """What makes two layouts differ, as far as the pack's manifest tells; the reference's Rust side writes no keys."""
    keys = pack.manifest.get("included_keys")
    if not isinstance(keys, list):
        return "give the model and the filter that the pack was written with"
    extra = [key for key in keys if key not in expected.included_keys]
    missing = [key for key in expected.included_keys if key not in keys]
    if not extra and not missing:
        return "the names are the same, so a shape or a dtype differs"
    found = [f"the pack alone has {extra[0]}"] if extra else []
    return " and ".join([*found, *([f"the model alone has {missing[0]}"] if missing else [])])
