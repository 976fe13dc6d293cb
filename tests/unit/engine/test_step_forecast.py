"""When to plan on top of a step: early rather than late, by size of step."""

from __future__ import annotations

import pytest

from replicas.engine.scheduler_output import SchedulerOutput
from replicas.engine.step_forecast import StepForecast


def step(*num_tokens: int) -> SchedulerOutput:
    return SchedulerOutput(
        step=1, keys=tuple(range(len(num_tokens))), num_scheduled_tokens=num_tokens
    )


def taught(*durations_ms: float, planning_ms: float = 0.1) -> StepForecast:
    forecast = StepForecast()
    for duration_ms in durations_ms:
        forecast.add_step(step(1), duration_ms * 1e-3)
        forecast.add_planning(planning_ms * 1e-3)
    return forecast


def test_an_unknown_step_is_planned_upon_at_once() -> None:
    assert StepForecast().plan_after_s(step(1)) == 0.0
    assert taught(50.0).plan_after_s(step(600)) == 0.0
    assert taught(50.0).plan_after_s(step(1, 1)) == 0.0


def test_a_steady_step_leaves_just_the_planning_time_and_a_margin() -> None:
    forecast = taught(*[20.0] * 60)
    assert forecast.plan_after_s(step(1)) == pytest.approx(20e-3 - 0.1e-3 - 0.3e-3, abs=2e-5)


def test_slow_planning_starts_earlier() -> None:
    slow = taught(*[20.0] * 60, planning_ms=5.0)
    assert slow.plan_after_s(step(1)) == pytest.approx(20e-3 - 5e-3 - 0.3e-3, abs=1e-4)


def test_noisy_steps_are_planned_upon_before_nearly_all_of_them_end() -> None:
    forecast = taught(*[18.0, 22.0, 19.0, 21.0] * 30)
    assert 12e-3 < forecast.plan_after_s(step(1)) < 18e-3


def test_one_outlier_does_not_make_the_next_plans_late() -> None:
    forecast = taught(*[20.0] * 60, 500.0)
    assert forecast.plan_after_s(step(1)) < 20e-3


def test_a_step_shorter_than_its_planning_is_planned_upon_at_once() -> None:
    assert taught(*[0.3] * 60).plan_after_s(step(1)) == 0.0


def test_sizes_are_told_apart_to_a_factor_of_two() -> None:
    forecast = StepForecast()
    for _ in range(60):
        forecast.add_step(step(1, 1, 1), 10e-3)
        forecast.add_step(step(64, 1), 80e-3)
    assert forecast.plan_after_s(step(1, 1)) == pytest.approx(forecast.plan_after_s(step(1, 1, 1)))
    assert forecast.plan_after_s(step(70, 2)) > 70e-3


def test_a_sign_that_comes_early_enough_is_waited_for() -> None:
    forecast = StepForecast()
    for _ in range(60):
        forecast.add_step(step(1), 20e-3, sign_s=2e-3)
        forecast.add_planning(0.1e-3)
    assert forecast.plan_after_s(step(1)) > 30e-3, "the sign, or the answer, comes first"


def test_a_sign_that_leaves_no_time_to_plan_is_not_waited_for() -> None:
    forecast = StepForecast()
    for _ in range(60):
        forecast.add_step(step(1), 20e-3, sign_s=0.3e-3)
        forecast.add_planning(0.1e-3)
    assert forecast.plan_after_s(step(1)) < 20e-3


def test_signs_that_stop_coming_are_waited_for_no_longer() -> None:
    forecast = StepForecast()
    for sign_s in (*[2e-3] * 60, *[0.0] * 20):
        forecast.add_step(step(1), 20e-3, sign_s=sign_s)
    assert forecast.plan_after_s(step(1)) < 20e-3


def test_a_plan_that_is_often_late_is_made_earlier_and_one_that_never_is_as_late_as_before() -> (
    None
):
    forecast = taught(*[2.0] * 60)
    punctual_s = forecast.plan_after_s(step(1))
    for at in range(400):
        forecast.add_idle(1.0e-3 if at % 10 == 0 else 0.01e-3, 2e-3)
    assert forecast.plan_after_s(step(1)) == 0.0
    for _ in range(5000):
        forecast.add_idle(0.01e-3, 2e-3)
    assert forecast.plan_after_s(step(1)) == pytest.approx(punctual_s)


def test_a_long_step_may_wait_for_a_plan_that_a_short_one_may_not_wait_for() -> None:
    short, long = taught(*[20.0] * 60), taught(*[20.0] * 60)
    punctual_s = long.plan_after_s(step(1))
    for at in range(400):
        idle_s = 0.5e-3 if at % 10 == 0 else 0.01e-3
        short.add_idle(idle_s, 1e-3)
        long.add_idle(idle_s, 10e-3)
    assert long.plan_after_s(step(1)) > punctual_s - 0.2e-3
    assert short.plan_after_s(step(1)) < punctual_s - 1e-3


def test_how_early_plans_are_made_is_bounded() -> None:
    forecast = taught(*[20.0] * 60)
    for _ in range(10_000):
        forecast.add_idle(50e-3, 20e-3)
    assert 16e-3 < forecast.plan_after_s(step(1)) < 17e-3


def test_one_stall_of_the_machine_moves_plans_by_little() -> None:
    forecast = taught(*[20.0] * 60)
    punctual_s = forecast.plan_after_s(step(1))
    forecast.add_idle(2.0, 20e-3)
    assert forecast.plan_after_s(step(1)) > punctual_s - 0.3e-3
