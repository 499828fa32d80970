"""Window metrics: sums and token-weighted means of what was measured, and NaN that stays NaN."""

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from sparktrain.results import StepRecord
from sparktrain.windows import table, windows
from tests.test_results import record


def steps_of(rank: int, *records: StepRecord) -> list[dict[str, Any]]:
    return [{"rank": rank} | one._asdict() for one in records]


def test_a_windows_loss_is_per_token_and_its_seconds_add_up() -> None:
    steps = [
        record(0, 8.0, 2, examples=5),
        record(1, 30.0, 10, examples=5),
        record(2, 9.0, 3, examples=5, delta_norm=0.5),
        record(3, 4.0, 4, examples=5),
    ]
    first, second = windows(steps_of(3, *steps))
    found = (first.window, first.rank, first.first_step, first.steps, first.tokens, first.examples)
    assert found == (0, 3, 0, 3, 15, 15)
    assert (first.loss_first, first.loss_mean, first.loss_last, first.delta_norm) == (4.0, 47 / 15, 3.0, 0.5)
    assert (first.seconds, first.data_seconds, first.payload_bytes) == (6.0, 0.1 + 0.1 + 0.1, 30)
    assert (second.window, second.first_step, second.steps, second.delta_norm) == (1, 3, 1, None)
    assert second.loss_first == second.loss_mean == second.loss_last == 1.0


@given(st.integers(0, 20), st.sets(st.integers(0, 50)), st.integers(1, 30))
def test_every_step_is_in_one_window_wherever_a_run_starts_and_syncs(start: int, ends: set[int], count: int) -> None:
    last = start + count - 1
    steps = [record(s, 1.0, 1, **({"delta_norm": 0.0} if s in ends else {})) for s in range(start, last + 1)]
    rows = windows(steps_of(0, *steps))
    assert [row.window for row in rows] == list(range(len(rows)))
    ends_here = sorted({end for end in ends if start <= end <= last} | {last})
    assert [row.first_step + row.steps - 1 for row in rows] == ends_here
    assert sum(row.steps for row in rows) == count


def test_ranks_that_come_later_have_the_windows_of_the_others() -> None:
    early = [record(s, 1.0, 1, **({"delta_norm": 1.0} if s % 2 else {})) for s in range(4)]
    late = [record(s, 1.0, 1, **({"delta_norm": 2.0} if s % 2 else {})) for s in range(4, 6)]
    rows = windows(steps_of(1, *late) + steps_of(0, *early, *late))
    assert [(row.window, row.rank, row.first_step) for row in rows] == [(0, 0, 0), (1, 0, 2), (2, 0, 4), (2, 1, 4)]


def test_a_loss_that_is_no_number_stays_one_and_what_was_not_measured_is_null(tmp_path: Path) -> None:
    steps = [record(0, 2.0, 2), record(1, math.nan, 2, delta_norm=1.0), record(2, 0.0, 0), record(3, 6.0, 2)]
    strange = [one._replace(delta_norm=math.nan) if one.step == 1 else one for one in steps]
    rows = windows(steps_of(1, *steps) + steps_of(0, *strange))
    pq.write_table(table(rows), tmp_path / "windows.parquet")
    read = pq.read_table(tmp_path / "windows.parquet")
    places = list(zip(read["window"].to_pylist(), read["rank"].to_pylist(), strict=True))
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    mean, norm = read["loss_mean"].to_pylist(), read["delta_norm"].to_pylist()
    assert [math.isnan(value) for value in mean] == [True, True, False, False]
    assert math.isnan(norm[0])
    assert norm[1:] == [1.0, None, None]
    assert math.isnan(read["loss_first"].to_pylist()[2])  # a step without target tokens has no loss
    assert mean[2] == 3.0
    assert table([]).num_rows == 0
