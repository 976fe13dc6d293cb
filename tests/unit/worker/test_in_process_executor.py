"""The in-process executor keeps order and refuses after close."""

from __future__ import annotations

import pytest

from cluster.base.errors import InternalError, WorkerDiedError
from replicas.engine.executor import Executor
from replicas.engine.scheduler_output import SchedulerOutput
from replicas.worker.in_process_executor import InProcessExecutor
from tests.support.runner_driver import RunnerDriver


def test_steps_come_back_in_order() -> None:
    executor: Executor = InProcessExecutor(RunnerDriver().runner)
    for step in (4, 5):
        executor.submit(SchedulerOutput(step=step))
    assert executor.poll(1.0)
    assert [executor.collect(1.0).step for _ in range(2)] == [4, 5]
    assert not executor.poll(0.0)
    with pytest.raises(InternalError, match="no submitted step"):
        executor.collect(1.0)


def test_closed_means_gone() -> None:
    executor = InProcessExecutor(RunnerDriver().runner)
    executor.submit(SchedulerOutput(step=0))
    executor.close()
    executor.close()
    with pytest.raises(WorkerDiedError):
        executor.submit(SchedulerOutput(step=1))
    with pytest.raises(WorkerDiedError):
        executor.poll(1.0)
    with pytest.raises(WorkerDiedError):
        executor.collect(1.0)
