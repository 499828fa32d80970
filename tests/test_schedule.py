"""Learning rates: warm-up, shape, and clamped at the end."""

import math

import pytest

from sparktrain.config import Schedule
from sparktrain.train.schedule import lr_at


def test_warm_up_is_linear_from_above_zero_to_the_peak() -> None:
    schedule = Schedule(warmup_steps=4)
    assert [lr_at(s, schedule, 1.0, 100) for s in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("kind", ["cosine", "linear", "warmup-stable-decay"])
def test_the_last_step_and_every_later_one_have_the_final_rate(kind: str) -> None:
    schedule = Schedule.model_validate({"kind": kind, "warmup_steps": 10, "final_ratio": 0.1})
    assert [lr_at(s, schedule, 2.0, 100) for s in (99, 100, 1000)] == pytest.approx([0.2, 0.2, 0.2])


def test_shapes_in_the_middle() -> None:
    def middle(kind: str, **more: float) -> float:
        values = {"kind": kind, "warmup_steps": 0, "final_ratio": 0.0} | more
        return lr_at(50, Schedule.model_validate(values), 1.0, 101)

    assert middle("cosine") == pytest.approx(0.5)
    assert middle("linear") == pytest.approx(0.5)
    assert middle("constant") == 1.0
    assert middle("warmup-stable-decay") == 1.0
    assert middle("warmup-stable-decay", decay_steps=100) == pytest.approx(0.5)
    assert lr_at(25, Schedule(warmup_steps=0, final_ratio=0.0), 1.0, 101) == pytest.approx(
        0.5 * (1 + math.cos(math.pi / 4))
    )


def test_a_run_that_is_all_warm_up_never_exceeds_the_peak() -> None:
    rates = [lr_at(s, Schedule(warmup_steps=50), 1.0, 10) for s in range(10)]
    assert rates == sorted(rates)
    assert max(rates) < 1.0
