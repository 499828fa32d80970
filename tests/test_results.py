"""Results: only our types come out of an output file, and ranks that differ fail the run."""

import os
import pickle
from pathlib import Path

import pytest

from sparktrain.errors import Diverged, LaunchError
from sparktrain.results import RankFailure, RankResult, RunResult, StepRecord, dump_outcome, load_outcome


def record(step: int, loss_sum: float, tokens: int, **changes: float) -> StepRecord:
    values = {"lr": 0.1, "grad_norm": 1.0, "seconds": 2.0, "data_seconds": 0.1, "compute_seconds": 1.5}
    values |= {"communication_seconds": 0.4, "payload_bytes": 10, "bytes_sent": 10, "bytes_received": 10}
    return StepRecord(step=step, loss_sum=loss_sum, tokens=tokens, **(values | changes))  # type: ignore[arg-type]


def rank_result(rank: int, records: list[StepRecord], digest: str = "d", world: int = 2) -> RankResult:
    return RankResult(rank, world, f"host{rank}", records, digest, 1000, 5.0, 4.0, 0.0)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_outcomes_survive_their_file() -> None:
    result = rank_result(1, [record(0, 6.0, 3)])
    failure = RankFailure(0, "h", "ValueError", "m", "t", 1, echo=False)
    assert load_outcome(dump_outcome(result), "f") == result
    assert load_outcome(dump_outcome(failure), "f") == failure


def test_a_planted_pickle_is_refused_named_and_not_run(tmp_path: Path) -> None:
    planted = pickle.dumps(Malicious(tmp_path / "executed"))
    with pytest.raises(LaunchError, match=r"rank-00000\.pickle was refused: it names posix\.system"):
        load_outcome(planted, "rank-00000.pickle")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps({"rank": 0}), pickle.dumps(RankResult)[:20]])
def test_what_is_no_outcome_is_refused(data: bytes) -> None:
    with pytest.raises(LaunchError, match="was refused"):
        load_outcome(data, "f")


def test_losses_are_weighted_by_tokens_and_times_are_the_slowest_ranks() -> None:
    merged = RunResult.merge(
        "run", [rank_result(1, [record(0, 30.0, 10, seconds=5.0)]), rank_result(0, [record(0, 30.0, 30)])]
    )
    assert merged.metrics["loss"].tolist() == [1.5]
    assert merged.metrics["seconds"].tolist() == [5.0]
    assert merged.summary()["tokens_per_second"] == 40 / 5.0
    assert merged.summary()["digests"] == {"rank 0 on host0": "d", "rank 1 on host1": "d"}
    assert merged.rank_table.num_rows == 2


def test_bytes_stand_beside_those_of_a_ring_all_reduce() -> None:
    one = [record(0, 30.0, 10), record(1, 30.0, 10, bytes_received=0)]
    result = RunResult.merge("run", [rank_result(0, one), rank_result(1, one)])
    # 1,000 parameters on 2 ranks: each ring brings a rank 2 * 1000 * 1/2 numbers.
    assert result.table["fewer_than_ring_fp32"].to_pylist() == [1000 * 4 / 10, None]
    assert result.table["fewer_than_ring_bf16"].to_pylist() == [1000 * 2 / 10, None]
    assert result.summary()["fewer_than_ring_fp32"] == 2 * 1000 * 4 / 10
    assert "received 800.0 times less than by a ring all-reduce in float32, 400.0 in bfloat16" in result.report()


def test_ranks_with_other_parameters_fail_the_run_by_name() -> None:
    with pytest.raises(Diverged, match="rank 0 has d, but rank 1 on host1 \\(e\\)"):
        RunResult.merge("run", [rank_result(0, [record(0, 1.0, 1)]), rank_result(1, [record(0, 1.0, 1)], digest="e")])


def test_a_rank_without_output_file_fails_the_run() -> None:
    with pytest.raises(LaunchError, match="no output file from rank 1 of 2"):
        RunResult.merge("run", [rank_result(0, [record(0, 1.0, 1)])])
