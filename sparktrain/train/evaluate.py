"""The loss: of a batch, over held-out data on all ranks, and of any model on a share of a split.

Shapes: M_ = sequences of a micro-batch, S = sequence length, V = vocabulary.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import groupby, islice

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sparktrain import heartbeat, storage, tokens
from sparktrain.config import RunConfig
from sparktrain.errors import DataError, ModelError
from sparktrain.evaluation import Share, Work
from sparktrain.plan import slots_of, spread_windows, window_length
from sparktrain.tokens.sequences import IGNORED, Window, stack
from sparktrain.tokens.sources.reach import known, opener
from sparktrain.train import models
from sparktrain.train.batch import Batch, check_separates, logits
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
def heldout_loss(
    model: PreTrainedModel, config: RunConfig, world: World, weights: Mapping[str, torch.Tensor] | None = None
) -> float | None:
    """Mean loss in nats per token over ``data.heldout``, the same number on every rank; None where there is none.

    ``weights``: those to measure instead of the model's own, by name, as in the midst of a strategy's round.
    """
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
    with _holding(model, weights or {}):
        for i in range(0, len(mine), config.train.micro_batch):
            heartbeat.at("evaluates")
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


@contextlib.contextmanager
def _holding(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """``model`` with ``weights`` in the place of its parameters of these names, which come back unchanged."""
    own = {name: parameter.data for name, parameter in model.named_parameters() if name in weights}
    parameters = dict(model.named_parameters())
    try:
        for name in own:
            parameters[name].data = weights[name].to(own[name].dtype)
        yield
    finally:
        for name, values in own.items():
            parameters[name].data = values


@torch.no_grad()
def measure(work: Work) -> Share:
    """The losses of this process's share of ``work``, on a GPU where there is one.

    Raises :class:`ModelError` where the model cannot be loaded whole, :class:`DataError` for tokens it does not know.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with storage.at_hand(work.model, "rank-", "strategy.") as here:
        model = models.load(here).to(device)
    models.check_causal(model)
    total, targets, checked = Fraction(0), 0, False
    windows = _windows(work)
    while part := list(islice(windows, work.micro_batch)):
        batch = Batch.of(stack(part))
        if batch.position_ids is not None and not checked:
            check_separates(model)
            checked = True
        if (largest := int(batch.tokens.max())) >= model.config.vocab_size:
            raise DataError(
                f"{', '.join(work.places)} has token id {largest}, but the vocab_size of {work.model} is "
                f"{model.config.vocab_size}: use data of the model's own tokenizer"
            )
        loss = float(token_losses(model, batch.to(device), work.autocast))
        if not math.isfinite(loss):
            raise ModelError(f"the loss of {work.model} is {loss}: its weights are damaged, or autocast is not for it")
        total += Fraction(loss)
        targets += batch.num_targets
    return Share(loss_sum=str(total), targets=targets)


def _windows(work: Work) -> Iterator[Window]:
    open_ = opener(work.data, known(work.shards))
    length = window_length(work.data.window, work.data.sequence_length)
    for shard, starts in groupby(work.share(), key=lambda window: window[0]):
        with contextlib.closing(tokens.TokenFile(shard, open_)) as file:
            for _, start in starts:
                yield file.window(start, length, documents=False)
