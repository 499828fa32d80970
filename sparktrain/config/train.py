"""How a run trains."""

import itertools
from typing import Literal

from pydantic import Field, model_validator

from sparktrain.config.section import Section


class Train(Section):
    steps: int = Field(1000, ge=1, le=2**40)
    """Optimizer steps."""
    total_batch: int = Field(64, ge=1)
    """Sequences per step over all ranks. The batches do not depend on the number of ranks."""
    batch_ramp: tuple[tuple[int, int], ...] = ()
    """Changes of total_batch, as [[step, sequences], ...]: from that step on a step has so many."""
    micro_batch: int = Field(8, ge=1)
    """Sequences per forward pass of one rank; the gradient is accumulated over the rank's share of the batch."""
    autocast: Literal["none", "bfloat16"] = "none"
    """Run the forward pass in this type while parameters keep theirs."""
    accumulate_fp32: bool = False
    """Accumulate micro-batch gradients in float32 when the parameters are bfloat16."""
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Clip the gradient to this global norm; 0 leaves it as it is."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """Where a loss or a gradient is not a number: stop; leave out that step's update on all ranks (of strategies whose
    ranks take steps of their own: on that rank); or go back to the newest checkpoint and leave out all updates from
    there to that step."""
    max_skipped: int = Field(5, ge=1)
    """Stop, too, after so many skipped steps in a row, or after going back so many times."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Steps whose update is left out, as [[first, last], ...]: their data is read, nothing is learned from it. Rounds
    of diloco and sparseloco end all the same: an outer momentum moves on, by what it remembers."""

    def leaves_out(self, step: int) -> bool:
        """Whether the update of ``step`` is left out."""
        return any(first <= step <= last for first, last in self.left_out)

    @model_validator(mode="after")
    def _left_out_are_ranges(self) -> "Train":
        for first, last in self.left_out:
            if not 0 <= first <= last:
                raise ValueError(f"train.left_out has [{first}, {last}]: expected [first, last] steps, from 0 on")
        return self

    @model_validator(mode="after")
    def _ramp_ascends(self) -> "Train":
        for (before, _), (step, batch) in itertools.pairwise([(0, 0), *self.batch_ramp]):
            if step <= before or batch < 1:
                raise ValueError(
                    f"train.batch_ramp has [{step}, {batch}] after step {before}: expected ascending steps from 1 on, "
                    "and at least 1 sequence"
                )
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> "Train":
        if self.micro_batch > self.total_batch:
            raise ValueError(
                f"train.micro_batch is {self.micro_batch}, more than train.total_batch {self.total_batch}: "
                f"set train.micro_batch to at most {self.total_batch}"
            )
        if self.total_batch % self.micro_batch:
            below = self.total_batch - self.total_batch % self.micro_batch
            raise ValueError(
                f"train.total_batch {self.total_batch} is not a multiple of train.micro_batch {self.micro_batch}: "
                f"set train.total_batch to {below} or {below + self.micro_batch}"
            )
        return self
