"""What a parameter pack of a model holds: which tensors, in what order, and the hash of that.

Tensors come in the order of module names, then of state-dict keys, both as plain strings (``10.w`` before ``2.w``).
The layout hash is over each tensor's name, shape, dtype and size: two models share it exactly if each can read the
other's pack. The filter is part of the layout.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from sparktrain.errors import ConfigError, ModelError


@dataclass(frozen=True)
class StateDictFilter:
    """Which tensors a pack holds: shell patterns on the full key, case-sensitive everywhere (``fnmatchcase``).

    Args:
        include_globs: keep keys that match one of these; none: keep all.
        exclude_globs: drop keys that match one of these, whatever includes say.

    Raises :class:`ConfigError` for an empty pattern or one with a NUL byte.
    """

    include_globs: tuple[str, ...] = ()
    exclude_globs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include_globs", "exclude_globs"):
            patterns = getattr(self, name)
            if isinstance(patterns, str):
                raise ConfigError(f"state_dict_filter.{name} is the string {patterns!r}: give a list of patterns")
            for pattern in patterns:
                if not pattern.strip():
                    raise ConfigError(f"state_dict_filter.{name} contains an empty pattern: remove it, or write *")
                if "\0" in pattern:
                    raise ConfigError(f"state_dict_filter.{name} pattern {pattern!r} contains a NUL byte: remove it")
            object.__setattr__(self, name, tuple(patterns))

    def selects(self, key: str) -> bool:
        """Whether ``key`` is in the pack, if its tensor is floating-point."""
        included = not self.include_globs or any(fnmatchcase(key, glob) for glob in self.include_globs)
        return included and not any(fnmatchcase(key, glob) for glob in self.exclude_globs)

    def to_json(self) -> dict[str, list[str]]:
        return {"include_globs": list(self.include_globs), "exclude_globs": list(self.exclude_globs)}


ALL = StateDictFilter()


@dataclass(frozen=True)
class Layout:
    """What a pack of a model holds, known without its values: a model on the meta device has one too.

    ``parameter_count`` counts values as the pack has them: a tied weight once per name.
    """

    filter: StateDictFilter
    layout_hash: str
    parameter_count: int
    included_keys: tuple[str, ...]
    excluded_float_keys: tuple[str, ...]
    ignored_non_float_keys: tuple[str, ...]


def layout(state: Any, filter: StateDictFilter = ALL) -> Layout:
    """The layout of ``state``: a module, ``{"model": module}``, ``{"modules": {name: module}}``, or tensors by name.

    Raises :class:`ModelError` for anything else, :class:`ConfigError` where the filter selects nothing.
    """
    return layout_of(entries_of(state), filter)


def entries_of(state: Any) -> dict[str, Any]:
    """State-dict entries by full key, in the format's order."""
    modules: Any = {"": state}
    if isinstance(state, Mapping) and "modules" in state:
        modules = state["modules"]
        if not isinstance(modules, Mapping) or not modules:
            raise ModelError("{'modules': ...} must contain a non-empty module mapping: give {name: module}")
    elif isinstance(state, Mapping) and "model" in state and not isinstance(state["model"], torch.Tensor):
        modules = {"": state["model"]}
    entries: dict[str, Any] = {}
    for name in sorted(modules):
        if name == "" and "modules" in (state if isinstance(state, Mapping) else ()):
            raise ModelError("module names must not be empty: name each module of {'modules': ...}")
        if "." in name:
            raise ModelError(f"module names must not contain '.', found {name!r}: rename the module")
        module = modules[name]
        tensors = module.state_dict() if isinstance(module, torch.nn.Module) else module
        if not isinstance(tensors, Mapping) or not all(isinstance(key, str) for key in tensors):
            raise ModelError(
                "a parameter pack requires a torch model, {'model': model}, {'modules': {'name': module}} or tensors "
                f"by name, found {type(module).__name__}"
            )
        entries |= {f"{name}.{key}" if name else key: tensors[key] for key in sorted(tensors)}
    return entries


def layout_of(entries: dict[str, Any], filter: StateDictFilter) -> Layout:
    floats = [k for k, v in entries.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    chosen = [key for key in floats if filter.selects(key)]
    left, ignored = set(floats) - set(chosen), set(entries) - set(floats)
    if not chosen:
        raise ConfigError(
            f"state_dict_filter selected zero floating-point parameters of {len(floats)}: "
            f"its include_globs {list(filter.include_globs)} and exclude_globs {list(filter.exclude_globs)} must leave "
            f"some of {', '.join(floats[:3]) or 'the model'}"
        )
    described = [
        {"name": k, "shape": list(entries[k].shape), "dtype": str(entries[k].dtype), "numel": entries[k].numel()}
        for k in chosen
    ]
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    return Layout(
        filter=filter,
        layout_hash=f"torch-layout-{hashlib.sha256(text.encode()).hexdigest()}",
        parameter_count=sum(entries[key].numel() for key in chosen),
        included_keys=tuple(chosen),
        excluded_float_keys=tuple(key for key in entries if key in left),
        ignored_non_float_keys=tuple(key for key in entries if key in ignored),
    )


def ties_of(tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of names whose tensors are the same memory."""
    first: dict[Any, str] = {}
    for key, tensor in tensors.items():
        if tensor.numel() and not tensor.is_meta:
            place = (tensor.data_ptr(), tensor.device, tuple(tensor.shape), tensor.stride())
            if first.setdefault(place, key) != key:
                yield first[place], key
