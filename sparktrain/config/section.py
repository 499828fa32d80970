"""What every section of the settings is: frozen, closed, explained by the docstrings of its fields."""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

# A number that a command line gives is text, which a Literal of numbers does not take.
WholeNumber = BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.isdigit() else value)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """``key was old, is new`` for each leaf that differs between two settings trees."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)]
    return [] if old == new else [f"{key} was {old!r}, is {new!r}"]
