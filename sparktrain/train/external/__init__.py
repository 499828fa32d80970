"""An external trainer: a user's own program does a rank's inner steps, told by files what to do.

Files, keys and environment variables are those of burn_p2p's checkpoint command, so a trainer written for it runs
unchanged. Per rank and round, in a directory of its own that is gone afterwards::

    base-parameters/          a parameter pack: where to start
    inner-state-input.blob    what the trainer left of its optimizer in the round before, if anything
    job.json                  what to do; the last to be written
    local-parameters/         a parameter pack the trainer writes: where it ended
    result.json               how it went; the trainer writes it last

The command finds the two JSON files by ``{job_manifest}`` and ``{result_manifest}`` in its arguments or by
``BURN_P2P_DILOCO_JOB_MANIFEST`` and ``BURN_P2P_DILOCO_RESULT_MANIFEST`` in its environment.
"""

from sparktrain.train.external.blob import StateBlob
from sparktrain.train.external.inner import (
    Command,
    InnerResult,
    InnerRound,
    cached_microshard_group,
    micro_epoch,
    run_inner,
)
from sparktrain.train.external.process import search_path
from sparktrain.train.external.trainer import StepData, Trainer, command_of

__all__ = [
    "Command",
    "InnerResult",
    "InnerRound",
    "StateBlob",
    "StepData",
    "Trainer",
    "cached_microshard_group",
    "command_of",
    "micro_epoch",
    "run_inner",
    "search_path",
]
