"""What can be set of strategies: one frozen class each, and one entry of ``Strategy``; and of their optimizer.

The code is one file under ``train/strategies``.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sparktrain.config.section import Section, WholeNumber


class Optimizer(Section):
    lr: float = Field(4e-4, gt=0, lt=10, allow_inf_nan=False)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    eps: float = Field(1e-8, gt=0, lt=1)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0, lt=10)
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""

    @model_validator(mode="after")
    def _betas_are_rates(self) -> "Optimizer":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are {list(self.betas)}: expected two numbers in [0, 1)")
        return self


def _topk_fits(section: Any) -> Any:
    if section.compression_topk > section.compression_chunk**2:
        raise ValueError(
            f"strategy.compression_topk is {section.compression_topk}, more than a chunk holds: "
            f"set it to at most {section.compression_chunk**2}"
        )
    return section


class AdamW(Section):
    kind: Literal["adamw"] = "adamw"
    """How ranks turn their gradients into shared progress."""


class Distro(Section):
    kind: Literal["distro"] = "distro"
    """How ranks turn their gradients into shared progress."""
    compression_decay: float = Field(0.999, ge=0, le=1)
    """Decay of the momentum that holds what was not sent yet; 0.95 to 0.98 for some hundred steps."""
    compression_topk: int = Field(32, ge=1)
    """DCT coefficients sent per chunk."""
    compression_chunk: int = Field(64, ge=2, le=64)
    """Edge of the square chunks the DCT works on."""
    values: Literal["fp32", "bf16", "int8", "1bit"] = "fp32"
    """How a coefficient's value is sent; 1bit: its sign alone."""
    overlap: bool = False
    """Messages travel during the next step and are applied after it; gradients are taken at a look-ahead point."""
    cut: Literal["padded", "divisor"] = "padded"
    """How matrices are cut into chunks; divisor: by Psyche's rule, for which prime dimensions are bad."""
    verify_every: int = Field(0, ge=0)
    """Compare a digest of the parameters over ranks every so many steps; 0: at checkpoints only."""
    max_refused: int = Field(10, ge=1)
    """Stop after so many steps in a row in which a rank's gradient was not finite."""

    _check = model_validator(mode="after")(_topk_fits)


def _is_sync_every(value: Any) -> Any:
    """One message for a union of types."""
    if value == "auto" or (str(value).isdecimal() and int(value) >= 1):
        return value
    raise ValueError(f"strategy.sync_every is {value!r}: expected a number of steps of at least 1, or auto")


SyncEvery = Annotated[int | Literal["auto"], BeforeValidator(_is_sync_every)]


class Diloco(Section):
    kind: Literal["diloco"] = "diloco"
    """How ranks turn their gradients into shared progress."""
    sync_every: SyncEvery = "auto"
    """Steps each rank takes by itself between two syncs; auto: as many as keep communication under 5 % of the time, but
    30 rounds in a run, measured in the second round, so it may be otherwise when run again (not when resumed)."""
    outer: Literal["auto", "average", "sgd"] = "auto"
    """How all move by the mean of the ranks' progress: average: by all of it; sgd: by SGD with the three settings
    below; auto: average where fewer than 500 rounds are planned, as momentum harms there, else sgd."""
    outer_lr: float = Field(0.7, gt=0, lt=10, allow_inf_nan=False)
    """Learning rate of the outer SGD."""
    outer_momentum: float = Field(0.9, ge=0, lt=1)
    """Its momentum."""
    nesterov: bool = True
    """Whether that is Nesterov's."""
    compression: Literal["none", "bf16", "int8", "int4"] = "none"
    """How progress is sent; none: as float32 by a ring all-reduce, which brings a rank fewer bytes than int8 by
    all-gather does from 8 ranks on, than int4 from 16."""
    num_fragments: int = Field(1, ge=1)
    """Parts of the parameters that are synchronised in turn, for messages that are so many times smaller."""
    fragment_sync_delay: int = Field(0, ge=0)
    """Steps that are taken while a message travels."""
    fragment_update_alpha: float = Field(0.0, ge=0, le=1)
    """Part of its own progress a rank keeps at a sync."""

    @model_validator(mode="after")
    def _fits(self) -> "Diloco":
        every = 0 if self.sync_every == "auto" else self.sync_every
        if every and every % self.num_fragments:
            raise ValueError(
                f"strategy.num_fragments is {self.num_fragments}, which does not divide strategy.sync_every {every}: "
                f"set strategy.sync_every to {-(-every // self.num_fragments) * self.num_fragments}"
            )
        interval = (every or 10) // self.num_fragments
        if self.fragment_sync_delay >= max(1, interval):
            raise ValueError(
                f"strategy.fragment_sync_delay is {self.fragment_sync_delay}, but a fragment is synchronised every "
                f"{max(1, interval)} steps: set it to at most {max(1, interval) - 1}"
            )
        if self.nesterov and self.outer_momentum == 0:
            raise ValueError(
                "strategy.nesterov is on but strategy.outer_momentum is 0: set strategy.outer_momentum above 0, or "
                "strategy.nesterov to false"
            )
        return self


class Sparseloco(Section):
    kind: Literal["sparseloco"] = "sparseloco"
    """How ranks turn their gradients into shared progress."""
    sync_every: SyncEvery = "auto"
    """Steps each rank takes by itself between two syncs; auto: as with diloco, but 50 rounds in a run."""
    outer_lr: float = Field(1.0, gt=0, lt=10, allow_inf_nan=False)
    """All move by so much of what ranks sent; 0.65 late in long runs."""
    compression_topk: int = Field(64, ge=1)
    """Weights sent per chunk: those that moved most."""
    compression_chunk: int = Field(64, ge=2, le=64)
    """A chunk is so many times so many weights."""
    error_decay: float = Field(0.95, ge=0, le=1)
    """Decay, per round, of progress that was not sent yet."""
    quantize_bits: Annotated[Literal[2, 8], WholeNumber] = 2
    """Bits of a value."""

    _check = model_validator(mode="after")(_topk_fits)


Strategy = AdamW | Distro | Diloco | Sparseloco
