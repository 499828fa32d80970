"""All of a run's settings, and how to train and launch."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from sparktrain.config.data import Data
from sparktrain.config.inner_loop import InnerLoop
from sparktrain.config.place import Place
from sparktrain.config.section import Section
from sparktrain.config.strategies import AdamW, Diloco, Optimizer, Sparseloco, Strategy
from sparktrain.config.train import Train


def _directory(value: Any) -> Any:
    if value == "":
        raise ValueError(
            "run.dir is '': expected a directory that driver and executors share, or s3://BUCKET/DIRECTORY"
        )
    return value


class Run(Section):
    dir: Annotated[Place, BeforeValidator(_directory)] = Path("runs/default")
    """Run directory: everything a run leaves; a directory, or one of an object store (s3://, gs://, abfs://). Every
    executor must be able to write it."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds the order of the data and the initial weights."""
    log_every: int = Field(10, ge=1)
    """Rank 0 prints one line every so many steps."""
    trackers: tuple[Literal["mlflow", "tensorboard"], ...] = ()
    """Where metrics go besides the run directory; needs the extra of that name: pip install 'sparktrain[mlflow]'."""


class Model(Section):
    from_pretrained: str | None = None
    """Local model directory or Hugging Face hub id to start from; none: start from scratch."""
    revision: str | None = None
    """Git revision of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model directory. Off unless you trust its author."""
    architecture: str = "llama"
    """Hugging Face model type to build from scratch (llama, qwen3, gpt2, ...)."""
    sizes: dict[str, Any] = {}
    """Fields of that model's Hugging Face config, such as hidden_size; vocab_size defaults to the tokenizer's."""
    tokenizer: Path | None = None
    """Tokenizer directory, copied into the trained model; default: ../tokenizer beside the data, if there."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the parameters."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Hugging Face attention implementation."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""


class Schedule(Section):
    kind: Literal["cosine", "linear", "constant", "warmup-stable-decay"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = Field(100, ge=0)
    """Steps of linear warm-up from 0."""
    final_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step and ever after, as a part of optimizer.lr."""
    decay_steps: int = Field(0, ge=0)
    """warmup-stable-decay: steps of the final linear decay; 0: a fifth of the run."""


class Eval(Section):
    every: int = Field(0, ge=0)
    """Measure the held-out loss after every so many steps, too, of the weights that ranks share then; 0: before and
    after training alone."""


class Checkpoint(Section):
    every: int = Field(200, ge=0)
    """Save a checkpoint after every so many steps, and after the last; 0: never."""
    keep_last: int = Field(2, ge=1)
    """Keep so many of the newest; older ones are removed when a newer one is there."""
    keep_every: int = Field(0, ge=0)
    """Keep for ever those at multiples of so many steps; 0: none."""


class Launch(Section):
    mode: Literal["auto", "executors", "local"] = "auto"
    """Where ranks run: on executors (a barrier stage), or as processes of the driver's machine; auto: local where
    the Spark master is local."""
    ranks: int = Field(0, ge=0)
    """Number of ranks; 0: one per slot the cluster has."""
    weights: Literal["equal", "measured"] | tuple[float, ...] = "equal"
    """How ranks share a step's sequences: equally, by the speed that each measures when it starts, or by a number for
    each rank."""
    launcher: Literal["torchrun", "direct"] = "torchrun"
    """Start ranks with torchrun, or (one rank per Spark task only) directly, which saves its start-up time."""
    threads: int = Field(0, ge=0)
    """CPU threads per rank; 0: spark.task.cpus, or the machine's cores divided among local ranks."""
    collective_timeout: int = Field(600, ge=1)
    """Seconds after which a rank that waits for another gives up; what is no step, such as loading and saving, may
    take nine tenths of it."""
    step_timeout: int = Field(0, ge=0)
    """Seconds without progress after which a rank hangs and all are started again; 0: 10 times the rank's slowest step,
    at least 60, where it is silent or computes, and nine tenths of collective_timeout where it reads or waits."""
    grace: float = Field(4.0, ge=0, le=3600)
    """Seconds that ranks have to save a checkpoint when the run is interrupted; then they are ended."""
    max_restarts: int = Field(3, ge=0)
    """Start ranks again, from the newest checkpoint, after so many failures that were nobody's mistake: a process
    killed, an executor lost."""
    min_ranks: int = Field(0, ge=0)
    """Go on with fewer ranks, at least so many, where executors are lost for good; 0: all are needed."""

    @field_validator("weights", mode="before")
    @classmethod
    def _word_of_the_command_line(cls, value: Any) -> Any:
        """The command line makes a list of what may be one."""
        if isinstance(value, list):
            return value[0] if value in (["equal"], ["measured"]) else tuple(value)
        return value

    @model_validator(mode="after")
    def _weights_are_speeds(self) -> "Launch":
        if isinstance(self.weights, tuple) and not all(w > 0 and math.isfinite(w) for w in self.weights):
            raise ValueError(f"launch.weights are {list(self.weights)}: expected numbers above 0")
        return self


class Common(Section):
    """All settings but the strategy: what runs have in common that are compared."""

    run: Run = Run()
    """Where the run lives."""
    data: Data = Data()
    """What it reads."""
    model: Model = Model()
    """What it trains."""
    train: Train = Train()
    """How long and in what batches."""
    optimizer: Optimizer = Optimizer()
    """How a gradient becomes a step."""
    schedule: Schedule = Schedule()
    """How the learning rate moves."""
    eval: Eval = Eval()
    """When the held-out loss is measured."""
    checkpoint: Checkpoint = Checkpoint()
    """What is kept to go on from."""
    launch: Launch = Launch()
    """How ranks are started."""

    @model_validator(mode="after")
    def _order_is_possible(self) -> "Common":
        if self.data.block > 1 and self.data.order != "shuffle":
            raise ValueError(f"data.block is {self.data.block}, but only data.order shuffle moves blocks: set it to 1")
        if self.data.order == "psyche" and not self.data.psyche_seed and self.run.seed >= 2**32:
            raise ValueError(f"run.seed is {self.run.seed}, Psyche's are below 2^32: set another, or data.psyche_seed")
        return self

    @model_validator(mode="after")
    def _heldout_data_is_there(self) -> "Common":
        if self.eval.every and self.data.heldout is None:
            raise ValueError(f"eval.every is {self.eval.every}, but there is no data to measure: set data.heldout")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that make it the same run: all but where it is stored and how launched, logged, reached and
        when it gives up."""
        reach = {"mirrors", "cache_dir", "cache_bytes"}
        policy = {"on_nonfinite", "max_skipped"}  # what stopped may go on with another
        exclude: Any = {"train": policy, "launch": True, "checkpoint": True, "eval": True, "data": reach}
        exclude |= {"run": {"dir", "log_every", "trackers"}, "inner_loop": {"timeout"}}
        return self.model_dump(mode="json", exclude=exclude)


class RunConfig(Common):
    strategy: Annotated[Strategy, Field(discriminator="kind")] = AdamW()
    """How ranks share their progress."""
    inner_loop: InnerLoop = InnerLoop()
    """A program of yours in place of the ranks' own steps between two syncs."""

    @model_validator(mode="after")
    def _command_has_rounds(self) -> "RunConfig":
        if not self.inner_loop.command:
            return self
        if not isinstance(self.strategy, Diloco | Sparseloco):
            raise ValueError(
                f"inner_loop.command is set, but strategy.kind {self.strategy.kind} syncs in every step: set "
                "strategy.kind to diloco or sparseloco, or leave inner_loop.command out"
            )
        if self.strategy.sync_every == "auto":
            raise ValueError(
                "inner_loop.command is set, but strategy.sync_every is auto, which measures steps of the rank's own: "
                "set strategy.sync_every to the number of steps of a round"
            )
        if self.train.left_out or self.train.on_nonfinite == "rollback":
            raise ValueError(
                "inner_loop.command is set, whose steps cannot be left out one by one: remove train.left_out, and set "
                "train.on_nonfinite to stop or skip"
            )
        return self
