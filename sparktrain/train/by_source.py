"""What each source of a mixture had in this rank's share of a step."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sparktrain.plan import PlanSpec, slots_of
from sparktrain.results.shares import SourceRecord
from sparktrain.train.batch import Batch
from sparktrain.train.world import World


def by_source(
    spec: PlanSpec, step: int, world: World, speeds: Sequence[float], batch: Batch, losses_B: npt.NDArray[np.float64]
) -> tuple[SourceRecord, ...]:
    """A record for each source, also for one that has no sequence in ``batch``; none where nothing is mixed.

    Args:
        speeds: by which ranks share the step, as :class:`sparktrain.train.batches.Batches` has them.
        losses_B: the loss of each sequence of ``batch``, in its order.
    """
    if not spec.mixed:
        return ()
    first, last = slots_of(world.rank, world.size, spec.batch_of(step), speeds)
    source = spec.sources_of(spec.first_position(step) + np.arange(first, last))
    counted = (None, batch.targets_of_rows.numpy(), losses_B)
    columns = [np.bincount(source, weights, len(spec.sources)).tolist() for weights in counted]
    return tuple(
        SourceRecord(one.name, int(sequences), int(tokens), loss)
        for one, sequences, tokens, loss in zip(spec.sources, *columns, strict=True)
    )
