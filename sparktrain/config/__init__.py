"""What a run is: one frozen, validated tree of settings.

``RunConfig`` is written resolved to the run directory and read back by every rank. How a user says it (TOML file,
command line, ``--help``) is ``cli.py``. A strategy's settings are one class of ``strategies.py``; its code is one file
under ``train/strategies``.
"""

from sparktrain.config.data import Data, DataSource, Skip
from sparktrain.config.inner_loop import InnerLoop
from sparktrain.config.run import Checkpoint, Common, Eval, Launch, Model, Run, RunConfig, Schedule
from sparktrain.config.section import Section
from sparktrain.config.strategies import AdamW, Diloco, Distro, Optimizer, Sparseloco, Strategy
from sparktrain.config.train import Train

__all__ = [
    "AdamW",
    "Checkpoint",
    "Common",
    "Data",
    "DataSource",
    "Diloco",
    "Distro",
    "Eval",
    "InnerLoop",
    "Launch",
    "Model",
    "Optimizer",
    "Run",
    "RunConfig",
    "Schedule",
    "Section",
    "Skip",
    "Sparseloco",
    "Strategy",
    "Train",
]
