"""The loss: of a batch, and over held-out data on all ranks.

Shapes: M_ = sequences of a micro-batch, S = sequence length, V = vocabulary.
"""

import contextlib

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sparktrain import tokens
from sparktrain.config import RunConfig
from sparktrain.errors import DataError
from sparktrain.plan import slots_of, spread_windows, window_length
from sparktrain.tokens.sequences import IGNORED, stack
from sparktrain.tokens.sources.reach import opener
from sparktrain.train.batch import Batch, logits
from sparktrain.train.world import World


def sequence_losses(model: PreTrainedModel, batch: Batch, autocast: str = "none") -> torch.Tensor:
    """``[M_]`` float32: the sum of the cross-entropy in nats over the targets of each sequence of ``batch``."""
    tokens_ML, positions_ML = batch.tokens, batch.position_ids
    labels_ML = tokens_ML if batch.labels is None else batch.labels
    low_precision = torch.autocast(tokens_ML.device.type, dtype=torch.bfloat16)
    with low_precision if autocast == "bfloat16" else contextlib.nullcontext():
        logits_MSV = logits(model, tokens_ML[:, :-1], None if positions_ML is None else positions_ML[:, :-1])
    targets = labels_ML[:, 1:].flatten()
    losses = F.cross_entropy(logits_MSV.float().flatten(0, 1), targets, reduction="none", ignore_index=IGNORED)
    return losses.view(len(tokens_ML), -1).sum(1)


def token_losses(model: PreTrainedModel, batch: Batch, autocast: str = "none") -> torch.Tensor:
    """The same over all of ``batch``, a float32 scalar."""
    return sequence_losses(model, batch, autocast).sum()


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
    total, targets = 0.0, 0
    for i in range(0, len(mine), config.train.micro_batch):
        part = mine[i : i + config.train.micro_batch]
        batch = Batch.of(stack([file.window(start, length, documents=False) for file, start in part]))
        total += float(token_losses(model, batch.to(world.device), config.train.autocast))
        targets += batch.num_targets
    model.train()
    for file in files.values():
        file.close()
    loss_sum, count = world.sum(total, targets)
    if not count:
        raise DataError("data.heldout has no target in its sequences, labels leave all tokens out: use other data")
    return loss_sum / count
