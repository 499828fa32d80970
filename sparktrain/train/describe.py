"""What training a config would need, without weights: asked by the driver of an executor, through the door."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM

from sparktrain.config import RunConfig, Strategy
from sparktrain.errors import ConfigError, ModelError
from sparktrain.train import pipelines, sanity
from sparktrain.train.models import model_config
from sparktrain.train.strategies import STRATEGIES
from sparktrain.train.weight_files import weight_files
from sparktrain.train.world import start_world


def describe(config: RunConfig) -> dict[str, Any]:
    """``num_parameters``, ``vocab_size``, ``max_positions``, per strategy the ``traffic`` of one step and rank, what
    this machine is found to be (``sanity``), and for data that is not in shards what stands for them, ``dataset``.

    Strategies other than the chosen one are taken with their default settings. Raises like
    :func:`sparktrain.train.models.model_config` and :func:`sparktrain.train.sanity.look`.
    """
    hf_config = model_config(config)
    if config.model.from_pretrained and Path(config.model.from_pretrained).is_dir():
        weight_files(Path(config.model.from_pretrained))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                hf_config, trust_remote_code=config.model.trust_remote_code
            )
    except ValueError as error:
        raise ModelError(
            f"the model is no causal language model, as llama is: {str(error).splitlines()[0]}; give another one"
        ) from None
    except (RuntimeError, TypeError, ZeroDivisionError) as error:  # torch's, of sizes that transformers let pass
        raise ConfigError(f"model.sizes make no model: {str(error).splitlines()[0]}") from None
    kind = STRATEGIES[config.strategy.kind]
    with start_world(max(1, config.launch.threads), config.launch.collective_timeout) as here:
        looked = sanity.look(config, model, kind, here)
    shapes = [p.shape for p in model.parameters() if p.requires_grad]
    sections = {section().kind: section() for section in get_args(Strategy)} | {config.strategy.kind: config.strategy}
    pipeline = pipelines.made(config, hf_config.vocab_size)
    world, element = config.launch.ranks, getattr(torch, config.model.dtype).itemsize
    return {
        "sanity": looked,
        "num_parameters": sum(shape.numel() for shape in shapes),
        "vocab_size": hf_config.vocab_size,
        "max_positions": getattr(hf_config, "max_position_embeddings", None),
        "traffic": {
            name: vars(kind.traffic_per_step(shapes, sections[name], world, element))
            for name, kind in STRATEGIES.items()
        },
        **({"dataset": asdict(pipeline.shard)} if pipeline else {}),
    }
