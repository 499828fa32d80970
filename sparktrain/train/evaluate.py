"""The loss: of a batch, and over held-out data on all ranks.

Shapes: M_ = sequences of a micro-batch, S = sequence length, V = vocabulary.
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sparktrain import tokens
from sparktrain.config import RunConfig
from sparktrain.plan import slots_of, spread_windows, window_length
from sparktrain.tokens.sources.reach import opener
from sparktrain.train.world import World


def token_losses(model: PreTrainedModel, tokens_MS: torch.Tensor, autocast: str = "none") -> torch.Tensor:
    """Sum of the cross-entropy in nats over all tokens of ``tokens_MS`` but each row's first, a float32 scalar."""
    low_precision = torch.autocast(tokens_MS.device.type, dtype=torch.bfloat16)
    with low_precision if autocast == "bfloat16" else contextlib.nullcontext():
        logits_MSV = model(input_ids=tokens_MS[:, :-1]).logits
    return F.cross_entropy(logits_MSV.float().flatten(0, 1), tokens_MS[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, config: RunConfig, world: World) -> float | None:
    """Mean loss in nats per token over ``data.heldout``, the same number on every rank; None where there is none."""
    data = config.data
    if data.heldout is None:
        return None
    located = tokens.locate_shards(data.heldout, opener(data, {}))
    open_ = opener(data, located)
    shards = [tokens.inspect(path, data.token_size, open_, known) for path, known in located.items()]
    length = window_length(data.window, data.sequence_length)
    windows = spread_windows(shards, data.sequence_length, data.heldout_sequences)
    first, last = slots_of(world.rank, world.size, len(windows))
    files = {shard.path: tokens.TokenFile(shard, open_) for shard, _ in windows[first:last]}
    mine = [(files[shard.path], start) for shard, start in windows[first:last]]
    model.eval()  # type: ignore[no-untyped-call]
    total = 0.0
    for i in range(0, len(mine), config.train.micro_batch):
        batch = tokens.read_windows(mine[i : i + config.train.micro_batch], length)
        total += float(token_losses(model, torch.from_numpy(batch).to(world.device), config.train.autocast))
    model.train()
    for file in files.values():
        file.close()
    loss_sum, count = world.sum(total, len(mine) * (length - 1))
    return loss_sum / count
