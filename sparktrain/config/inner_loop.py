"""What can be set of a program that takes the inner steps of a rank. The code is in ``train/external``."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from sparktrain.config.section import Section


def _is_command(value: Any) -> Any:
    """A line for a shell is no list of arguments, and a command line makes a list of one of it."""
    if isinstance(value, list) and len(value) == 1 and len(str(value[0]).split()) > 1:
        value = value[0]
    if isinstance(value, str):
        raise ValueError(f'inner_loop.command is {value!r}: expected a list, as ["python", "train.py"]')
    return value


class InnerLoop(Section):
    command: Annotated[tuple[str, ...], BeforeValidator(_is_command)] = ()
    """Program and arguments that take a rank's steps of a round, by the job in {job_manifest}; none: the rank itself
    takes them. What optimizer, schedule and train say of a step, but its batch, is then the program's own affair."""
    env: dict[str, str] = {}
    """Environment variables of the program, over those of the rank."""
    module_search_roots: tuple[Path, ...] = ()
    """Directories put first on its PYTHONPATH."""
    timeout: float = Field(3600.0, gt=0, allow_inf_nan=False)
    """Seconds a round may take it; launch.collective_timeout bounds by how much one rank's may take longer."""
    require_exact_steps: bool = True
    """A round in which it takes another number of steps than it was asked for ends the run."""
    include_globs: tuple[str, ...] = ()
    """Tensors it trains, by shell patterns on their names; none: all of them."""
    exclude_globs: tuple[str, ...] = ()
    """Tensors it leaves as they are, whatever include_globs say."""

    @model_validator(mode="after")
    def _texts_can_be_passed(self) -> "InnerLoop":
        if self.command and not self.command[0].strip():
            raise ValueError(f"inner_loop.command is {list(self.command)}: expected the program first")
        texts = [*self.command, *self.env, *self.env.values(), *map(str, self.module_search_roots)]
        if any("\0" in text for text in texts) or not all(key.strip() and "=" not in key for key in self.env):
            raise ValueError("inner_loop.command and inner_loop.env take no NUL bytes and no empty names: remove them")
        for name in ("include_globs", "exclude_globs"):
            if not all(pattern.strip() for pattern in getattr(self, name)):
                raise ValueError(f"inner_loop.{name} contains an empty pattern: remove it, or write *")
        return self
