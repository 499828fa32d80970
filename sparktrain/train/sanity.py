"""Whether this machine can train a config, tried out: its strategy takes a round on a few thousand weights."""

import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparktrain.config import RunConfig
from sparktrain.errors import ConfigError, LaunchError, SparktrainError
from sparktrain.train import parameter_pack as packs
from sparktrain.train.external import command_of, search_path
from sparktrain.train.strategies.contract import StrategyKind
from sparktrain.train.world import World

# Whole chunks of 64 x 64 weights, together with the vector: padding would count as need.
_ROWS, _COLUMNS = 127, 64
_ROUNDS_OF_AUTO = 30


def look(config: RunConfig, model: torch.nn.Module, kind: StrategyKind, world: World) -> dict[str, Any]:
    """What a row of the preflight table says of this machine.

    ``layout``: hash of the model's parameter pack; ``tensors``: how many an external trainer trains, None without one.
    ``needs``: bytes of parameters, gradients and state on a rank's device, to which activations come; ``has``: of that
    device. Raises a subclass of :class:`SparktrainError` for what cannot run here.
    """
    tensors = None
    if config.inner_loop.command:
        command = command_of(config.inner_loop)
        tensors = len(packs.layout(model, command.state_dict_filter).included_keys)
        check_program(command.argv[0], command.env)
    try:
        per_weight = _try_out(config, kind, world.device)
    except SparktrainError:
        raise
    except Exception as error:  # whatever a device, a fused kernel or a codec may say
        said = str(error).partition("\n")[0]
        raise LaunchError(f"strategy {config.strategy.kind} does not run on {world.host}: {said}") from error
    return {
        "layout": packs.layout(model).layout_hash,
        "tensors": tensors,
        "device": str(world.device),
        "needs": round(per_weight * sum(p.numel() for p in model.parameters() if p.requires_grad)),
        "has": _memory(world.device),
    }


def _try_out(config: RunConfig, kind: StrategyKind, device: torch.device) -> float:
    """A round of the strategy of ``config``, as short as its sync allows; bytes that it holds per weight."""
    section, dtype = config.strategy, getattr(torch, config.model.dtype)
    planned, steps = config.train.steps, 2
    if (every := getattr(section, "sync_every", None)) is not None:
        steps = getattr(section, "num_fragments", 1) * (getattr(section, "fragment_sync_delay", 0) + 1)
        # The same number of rounds, so that what "auto" chooses is the same.
        planned = steps * (_ROUNDS_OF_AUTO if every == "auto" else max(1, planned // every))
        section = section.model_copy(update={"sync_every": steps})
    rows = max(_ROWS, 2 * steps)
    parameters = {
        "matrix": torch.nn.Parameter(torch.ones(rows, _COLUMNS, dtype=dtype, device=device)),
        "vector": torch.nn.Parameter(torch.ones(_COLUMNS, dtype=dtype, device=device)),
    }
    strategy = kind.build(parameters, section, config.optimizer, planned)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        strategy.average_gradients()
        strategy.step(0.1, 1)
    strategy.sync()
    after = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
    if not after.isfinite().all() or bool((after == 1).all()):
        raise LaunchError(f"strategy {config.strategy.kind} leaves parameters as they are, or not finite, on {device}")
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(strategy.state_dict())}
    for parameter in parameters.values():
        assert parameter.grad is not None
        held |= {t.untyped_storage().data_ptr(): t.nbytes for t in (parameter.detach(), parameter.grad)}
    return sum(held.values()) / sum(p.numel() for p in parameters.values())


def check_program(program: str, env: Mapping[str, str]) -> None:
    """``ConfigError`` where a rank on this machine would not find its trainer."""
    path = env.get("PATH", search_path())
    if shutil.which(program, path=path) is None:
        raise ConfigError(f"inner_loop.command: program {program!r} was not found: give its path, or one on the PATH")


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping | list | tuple):
        for item in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _tensors(item)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
