"""Any Hugging Face causal language model: from scratch by sizes, or from a local directory or hub id."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparktrain import storage
from sparktrain.config import Model, RunConfig
from sparktrain.errors import ConfigError, ModelError
from sparktrain.train.pretrained import check_config, load_tokenizer, pretrained, quieten, unusable
from sparktrain.train.weight_files import weight_files
from sparktrain.train.world import World

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def model_config(config: RunConfig) -> Any:
    """The Hugging Face config of the model to train.

    Raises :class:`ModelError` for a directory or id without a usable config, :class:`ConfigError` for wrong sizes
    or a sequence longer than the model's positions.
    """
    quieten()
    settings = config.model
    hf_config = _pretrained_config(settings) if settings.from_pretrained else _scratch_config(config)
    positions = getattr(hf_config, "max_position_embeddings", None)
    if positions is not None and config.data.sequence_length > positions:
        raise ConfigError(
            f"data.sequence_length is {config.data.sequence_length}, more than the model's {positions} positions: "
            f"set data.sequence_length to at most {positions} or model.sizes.max_position_embeddings to more"
        )
    return hf_config


def build(config: RunConfig, world: World, checkpoint: Path | None = None) -> PreTrainedModel:
    """The model in training mode on this rank's device, with rank 0's weights on every rank, those of ``checkpoint``
    where one is given.

    Only rank 0 reads or draws weights; the others receive them by broadcast, so that a hub is asked once and all
    ranks start equal to the bit.
    """
    settings = config.model
    source = checkpoint or settings.from_pretrained
    text = model_config(config).to_json_string(use_diff=False) if world.rank == 0 else ""
    values = json.loads(world.broadcast_bytes(text.encode()))
    torch.manual_seed(config.run.seed)
    options: dict[str, Any] = {"dtype": _DTYPES[settings.dtype], "attn_implementation": settings.attention}
    if source and world.rank == 0:
        revision = None if checkpoint else settings.revision
        with storage.at_hand(checkpoint, "rank-", "strategy.") if checkpoint else nullcontext(source) as here:
            if Path(here).is_dir():
                weight_files(Path(here))
            model = pretrained(here, revision=revision, trust_remote_code=settings.trust_remote_code, **options)
    else:
        hf_config = model_config(config) if settings.trust_remote_code else AutoConfig.for_model(**values)
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            hf_config, trust_remote_code=settings.trust_remote_code, **options
        )
    model.to(world.device)  # type: ignore[arg-type]
    model.config.use_cache = False
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[no-untyped-call]
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), src=0)
    check_causal(model)
    model.train()
    return model


def load(directory: Path) -> Any:
    """The model in a Hugging Face directory as it was stored, in evaluation mode, on the CPU.

    Raises :class:`ModelError` for files that are damaged, and where some are missing: what they lack would be drawn at
    random.
    """
    weight_files(directory)
    model: Any = pretrained(directory, dtype="auto")
    return model.eval()


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """:class:`ConfigError` where a token's prediction depends on what follows it: its loss would fall to nothing."""
    length = min(8, getattr(model.config, "max_position_embeddings", None) or 8)
    tokens = torch.zeros(2, length, dtype=torch.int64, device=model.device)
    tokens[1, -1] = model.config.vocab_size - 1
    one, other = model.eval()(input_ids=tokens).logits[:, :-1].float()  # type: ignore[no-untyped-call]
    if float((one - other).abs().max()) > 1e-3 * float(one.abs().max()):
        raise ConfigError(
            f"model {model.config.model_type} looks at the tokens it is to predict: use a causal architecture, as llama"
        )


def digest(model: PreTrainedModel) -> str:
    """sha256 over all parameters, by name: equal on two ranks exactly if they hold the same bits."""
    sha = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        sha.update(name.encode())
        sha.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def weights(model: PreTrainedModel, current: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``model`` with the parameters ``current``, copied to this machine's memory; tied weights
    stay one tensor."""
    owners = {id(parameter): name for name, parameter in model.named_parameters()}
    owner_of = {name: owners[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    copies = {
        name: current.get(name, tensor).detach().to("cpu", copy=True)
        for name, tensor in state.items()
        if owner_of.get(name, name) == name
    }
    return {name: copies[owner_of.get(name, name)] for name in state}


def write(model: PreTrainedModel, state: dict[str, Tensor], config: RunConfig, path: Path) -> list[Path]:
    """Write a model of the kind of ``model`` with the weights ``state`` and its tokenizer into ``path``, as a Hugging
    Face directory; returns its files. ``model`` may go on training meanwhile."""
    quieten()
    model.save_pretrained(path, state_dict=state)
    # Off while training, on for whoever opens the directory; the model itself must not change under the loop.
    settings = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"use_cache": True}
    (path / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer = tokenizer_path(config)
    if tokenizer:
        load_tokenizer(tokenizer).save_pretrained(path)
    return [
        file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "rank-", "strategy."))
    ]


def save(model: PreTrainedModel, config: RunConfig, path: Path) -> None:
    """Write ``model`` with its tokenizer as a Hugging Face directory at ``path``, whole or not at all."""
    if not storage.is_local(path):
        with storage.room(path) as here:
            write(model, model.state_dict(), config, here)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write(model, model.state_dict(), config, temporary)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def tokenizer_path(config: RunConfig) -> Path | None:
    """The tokenizer directory that belongs to the data: as set, or ``../tokenizer`` beside it, where
    ``jobs/tokenize.py`` puts it; of several sources, the first that has one."""
    if config.model.tokenizer:
        return config.model.tokenizer
    beside = [Path(places[0]).parent / "tokenizer" for places in config.data.trained_on.values()]
    return next((path for path in beside if (path / "tokenizer.json").exists()), None)


def _pretrained_config(settings: Model) -> Any:
    source = str(settings.from_pretrained)
    local = Path(source)
    if local.is_dir() and not (local / "config.json").exists():
        trained = (local / "model" / "config.json").exists()
        instead = f"did you mean {local / 'model'}?" if trained else "give a Hugging Face model directory"
        raise ModelError(f"model directory {source} has no config.json: {instead}")
    if not local.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ModelError(
            f"model.from_pretrained {source} is no directory and no hub id: give a Hugging Face model directory that "
            "executors can read, or OWNER/NAME"
        )
    try:
        check_config(source, settings.revision)
        hf_config = AutoConfig.from_pretrained(
            source, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except ModelError:
        raise
    except Exception as error:  # of what is no config.json, transformers raises what it stumbled over
        raise unusable(source, error) from None
    for name, value in settings.sizes.items():
        if getattr(hf_config, name, None) != value:
            raise ConfigError(
                f"model.sizes.{name} is {value!r}, but model.from_pretrained {source} has "
                f"{getattr(hf_config, name, None)!r}: remove it, or model.from_pretrained"
            )
    return hf_config


def _scratch_config(config: RunConfig) -> Any:
    settings, sizes = config.model, dict(config.model.sizes)
    try:
        known = AutoConfig.for_model(settings.architecture)
    except ValueError:
        raise ConfigError(
            f"model.architecture {settings.architecture!r} is unknown to transformers: use a model_type, as llama"
        ) from None
    unknown = sorted(set(sizes) - set(known.to_dict()))
    if unknown:
        raise ConfigError(f"model.sizes.{unknown[0]} is not a size of {settings.architecture}: remove it")
    if path := tokenizer_path(config):
        tokenizer = load_tokenizer(path)
        # A multiple of 64 keeps the largest matrix aligned; the ids above the tokenizer's are never used.
        sizes.setdefault("vocab_size", -(-len(tokenizer) // 64) * 64)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # the architecture's own are of its own tokenizer
            sizes.setdefault(name, getattr(tokenizer, name))
    try:
        return AutoConfig.for_model(settings.architecture, **sizes)
    except Exception as error:  # transformers validates sizes with several exception types
        raise ConfigError(
            f"model.sizes do not make a {settings.architecture}: {' '.join(str(error).split())}"
        ) from None
