"""Window metrics: sums and token-weighted means of what was measured, and NaN that stays NaN."""

import math
from pathlib import Path

import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from sparktrain.windows import table, windows
from tests.test_results import record


def test_a_windows_loss_is_per_token_and_its_seconds_add_up() -> None:
    steps = [record(i, loss, tokens) for i, (loss, tokens) in enumerate([(8.0, 2), (30.0, 10), (9.0, 3), (4.0, 4)])]
    first, second = windows(3, steps, 3, 5, {0: 0.5})
    assert (first.window, first.rank, first.first_step, first.steps, first.tokens, first.examples) == (
        0,
        3,
        0,
        3,
        15,
        15,
    )
    assert (first.loss_first, first.loss_mean, first.loss_last, first.delta_norm) == (4.0, 47 / 15, 3.0, 0.5)
    assert (first.seconds, first.data_seconds, first.payload_bytes) == (6.0, 0.1 + 0.1 + 0.1, 30)
    assert (second.window, second.first_step, second.steps, second.delta_norm) == (1, 3, 1, None)
    assert second.loss_first == second.loss_mean == second.loss_last == 1.0


@given(st.integers(0, 20), st.integers(0, 30), st.integers(1, 7))
def test_every_step_is_in_one_window_wherever_a_run_starts(start: int, count: int, sync_every: int) -> None:
    rows = windows(0, [record(start + i, 1.0, 1) for i in range(count)], sync_every, 2)
    assert sum(row.steps for row in rows) == count
    assert [row.window for row in rows] == sorted({(start + i) // sync_every for i in range(count)})
    assert all(row.first_step // sync_every == row.window for row in rows)


def test_a_loss_that_is_no_number_stays_one_and_what_was_not_measured_is_null(tmp_path: Path) -> None:
    steps = [record(0, 2.0, 2), record(1, math.nan, 2), record(2, 0.0, 0), record(3, 6.0, 2)]
    rows = windows(1, steps, 2, 1) + windows(0, steps, 2, 1, {0: math.nan})
    pq.write_table(table(rows), tmp_path / "windows.parquet")
    read = pq.read_table(tmp_path / "windows.parquet")
    assert list(zip(read["window"].to_pylist(), read["rank"].to_pylist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    mean, norm = read["loss_mean"].to_pylist(), read["delta_norm"].to_pylist()
    assert [math.isnan(value) for value in mean] == [True, True, False, False]
    assert math.isnan(norm[0])
    assert norm[1:] == [None, None, None]
    assert math.isnan(read["loss_first"].to_pylist()[2])  # a step without target tokens has no loss
    assert mean[2] == 3.0
    assert table([]).num_rows == 0
