"""Sequences that are not in shards: one file per kind of pipeline, and a table of them.

To the plan, what a pipeline makes is one shard whose rows are numbered from 0: a microshard is a number. So order,
skips, shares of ranks and resuming are those of shards, and what a number stands for must not depend on when, where or
with which others it is asked for.
"""

from collections.abc import Callable
from typing import Protocol

from sparktrain.config import RunConfig
from sparktrain.errors import DataError
from sparktrain.plan import PlanSpec, Share
from sparktrain.tokens.sequences import Sequences
from sparktrain.tokens.shard import Shard
from sparktrain.train.pipelines import generated, indexed, micro_epoch

__all__ = ["PIPELINES", "Pipeline", "made", "planned"]


class Pipeline(Protocol):
    """Made from the settings and the model's vocabulary size by a row of ``PIPELINES``, which raises
    :class:`sparktrain.errors.SparktrainError` for what cannot be used."""

    shard: Shard
    """What stands for it in the plan: ``path`` is its name, a row a sequence."""

    def read(self, share: Share) -> Sequences:
        """The sequences of ``share``. Called by one thread."""


PIPELINES: dict[str, Callable[[RunConfig, int], Pipeline]] = {
    "indexed": indexed.Indexed,
    "generated": generated.Generated,
    "micro-epoch": micro_epoch.MicroEpoch,
}


def made(config: RunConfig, vocab_size: int) -> Pipeline | None:
    """The pipeline of ``config``; None: token shards."""
    kind = config.data.pipeline
    return None if kind == "sharded" else PIPELINES[kind](config, vocab_size)


def planned(config: RunConfig, vocab_size: int, spec: PlanSpec) -> Callable[[Share], Sequences] | None:
    """What makes the sequences of a share by the plan ``spec``, None where shards have them. Raises
    :class:`DataError` where it is not what was planned."""
    pipeline = made(config, vocab_size)
    if pipeline is None:
        return None
    (promised,) = spec.shards
    if pipeline.shard != promised:
        raise DataError(
            f"{config.data.dataset} has {_says(pipeline.shard)}, and had {_says(promised)} when the plan was made: it "
            "must be the same everywhere and always; restore it or choose another run.dir"
        )
    return pipeline.read


def _says(shard: Shard) -> str:
    return f"{shard.num_tokens // shard.row_length} sequences with {', '.join(('input_ids', *shard.columns))}"
