"""What every section of the settings is: frozen, closed, explained by the docstrings of its fields."""

from pydantic import BaseModel, BeforeValidator, ConfigDict

# A number that a command line gives is text, which a Literal of numbers does not take.
WholeNumber = BeforeValidator(lambda value: int(value) if isinstance(value, str) and value.isdigit() else value)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
