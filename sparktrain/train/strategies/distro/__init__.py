"""DisTrO, the one strategy that is more than a file: ``optimizer.py`` is the class and says what it does."""

from sparktrain.train.strategies.distro.optimizer import DisTrO, build, traffic_per_step

__all__ = ["DisTrO", "build", "traffic_per_step"]
