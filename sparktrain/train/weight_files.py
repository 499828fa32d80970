"""Which files a model's weights are in, and whether they are whole: safetensors and nothing else."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sparktrain.errors import ModelError

_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of the model in ``directory``, whose headers agree with their lengths.

    Raises :class:`ModelError` where there are none, one is missing or torn, or an index leads out of ``directory``.
    """
    single, index = directory / "model.safetensors", directory / _INDEX
    if single.exists():
        names = [single.name]
    elif index.exists():
        names = _indexed(index)
    elif pickles := sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern)):
        raise ModelError(
            f"{directory} has its weights in {pickles[0]}, a pickle, which could run anything: convert them to "
            "safetensors where you trust them (transformers: from_pretrained, then save_pretrained)"
        )
    else:
        raise ModelError(
            f"{directory} is no model: expected model.safetensors, {_INDEX} or a parameter pack's manifest.json in it"
        )
    for name in names:
        try:
            with safe_open(directory / name, framework="pt"):
                pass  # it checks header, bounds and length
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{directory / name} is no safetensors file: {error}; it was not copied whole") from None
    return tuple(directory / name for name in names)


def _indexed(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{index} is no index of safetensors files: it has no weight_map") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (index.parent / name).exists():
            raise ModelError(f"{index} names {name!r}, which is not beside it: the model was not copied whole")
    return names
