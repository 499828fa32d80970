"""The strategy table: a new strategy is one file beside this one, one row here and one section in
``sparktrain/config/strategies.py``."""

from sparktrain.train.strategies import allreduce, diloco, distro, sparseloco
from sparktrain.train.strategies.contract import Strategy, StrategyKind, Traffic

__all__ = ["STRATEGIES", "Strategy", "StrategyKind", "Traffic"]

STRATEGIES: dict[str, StrategyKind] = {
    "adamw": StrategyKind(allreduce.build, allreduce.traffic_per_step),
    "distro": StrategyKind(distro.build, distro.traffic_per_step),
    "diloco": StrategyKind(diloco.build, diloco.traffic_per_step),
    "sparseloco": StrategyKind(sparseloco.build, sparseloco.traffic_per_step),
}
