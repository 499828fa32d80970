"""What is compared."""

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BeforeValidator, Field, model_validator

from sparktrain.config import Common, RunConfig, Section, Strategy

KINDS = tuple(section().kind for section in get_args(Strategy))


def _table(value: Any) -> Any:
    """A strategy by its name alone, or with settings, name and learning rates in one table."""
    table = {"kind": value} if isinstance(value, str) else dict(value) if isinstance(value, dict) else value
    if not isinstance(table, dict) or "strategy" in table:
        return table
    if table.get("kind") not in KINDS:
        raise ValueError(f"strategies has the kind {table.get('kind')!r}: expected one of {', '.join(KINDS)}")
    own: dict[str, Any] = {name: table.pop(name) for name in ("name", "lr") if name in table}
    known = next(section for section in get_args(Strategy) if section().kind == table["kind"]).model_fields
    if strange := table.keys() - known.keys():
        settings = ", ".join(["name", "lr", *known])
        raise ValueError(f"strategies has {min(strange)!r} with {table['kind']}: expected some of {settings}")
    if "lr" in own:
        own["lr"] = _several(own["lr"])
    return own | {"strategy": table}


def _several(value: Any) -> Any:
    return (
        tuple(value) if isinstance(value, list) else (value,) if isinstance(value, str | dict | int | float) else value
    )


class Contender(Section):
    """A strategy with its settings, perhaps at several learning rates."""

    name: str = Field("", pattern=r"^([A-Za-z0-9][A-Za-z0-9_.=+, -]*)?$")
    """In table and pictures; its runs' directories begin with it. None: its kind."""
    strategy: Annotated[Strategy, Field(discriminator="kind")]
    """What it is."""
    lr: tuple[Annotated[float, Field(gt=0, lt=10, allow_inf_nan=False)], ...] = ()
    """Peak learning rates, a run each, of which the best one counts; none: optimizer.lr."""

    @property
    def label(self) -> str:
        return self.name or self.strategy.kind


Contenders = Annotated[
    tuple[Annotated[Contender, BeforeValidator(_table)], ...], BeforeValidator(_several), Field(min_length=1)
]


class Compare(Common):
    """Train the same model on the same data under several strategies and compare them; run.dir holds all runs."""

    strategies: Contenders = tuple(Contender.model_validate(_table(kind)) for kind in KINDS)
    """What is compared: names of strategies, or tables of kind, name, lr (a number or a list) and the strategy's own
    settings."""

    @model_validator(mode="after")
    def _names_differ(self) -> "Compare":
        name, count = Counter(contender.label for contender in self.strategies).most_common(1)[0]
        if count > 1:
            raise ValueError(f"strategies has {count} of the name {name}: give each another name")
        return self

    def runs(self) -> Iterator[tuple[Contender, RunConfig]]:
        """Every run, in order."""
        common = self.model_dump(exclude={"strategies"})
        for contender in self.strategies:
            for lr in contender.lr or (self.optimizer.lr,):
                own = {
                    "run": common["run"] | {"dir": self.run.dir / f"{contender.label}-lr{lr:g}"},
                    "optimizer": common["optimizer"] | {"lr": lr},
                    "strategy": contender.strategy.model_dump(),
                }
                yield contender, RunConfig.model_validate(common | own)
