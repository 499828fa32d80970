"""What ranks hand back and what the driver makes of it: plain values only, never tensors."""

from sparktrain.results.outcome import Outcome, RankFailure, RankResult, dump_outcome, load_outcome
from sparktrain.results.records import RankSteps, StepRecord, read_records, write_records
from sparktrain.results.run import RunResult
from sparktrain.results.shares import Asked, SourceRecord

__all__ = [
    "Asked",
    "Outcome",
    "RankFailure",
    "RankResult",
    "RankSteps",
    "RunResult",
    "SourceRecord",
    "StepRecord",
    "dump_outcome",
    "load_outcome",
    "read_records",
    "write_records",
]
