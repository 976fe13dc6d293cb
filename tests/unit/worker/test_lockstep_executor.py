"""Lock-steps over real sockets: who is sent what, who answers, and what a lost rank is called."""

from __future__ import annotations

import threading
import time

import pytest

from cluster.base.errors import CollectiveTimeoutError, InternalError, WorkerDiedError
from replicas.api import SamplingParams
from replicas.engine.lockstep import LockstepPlan, StepHeader
from replicas.engine.scheduler_output import NewRequest, SchedulerOutput, StepOutput
from replicas.worker import wire
from replicas.worker.link_listener import LinkListener
from replicas.worker.lockstep_executor import LockstepExecutor
from replicas.worker.worker_link import WorkerLink

DP, TP = 2, 2
NODES = ("a", "a", "b", "b")


class Ends:
    """Both ends of the links of two groups of two ranks."""

    def __init__(self) -> None:
        listener = LinkListener(size=DP * TP, epoch="e", secret="s", host="127.0.0.1", nodes=NODES)
        self.workers: list[WorkerLink] = []

        def join() -> None:
            for rank in range(DP * TP):
                link = WorkerLink.connect(
                    listener.address, rank=rank, epoch="e", secret="s", timeout_s=5.0
                )
                self.workers.append(link)

        thread = threading.Thread(target=join)
        thread.start()
        self.executor = LockstepExecutor(listener.accept_all(timeout_s=5.0), tp_size=TP)
        thread.join()
        listener.close()

    def answer(self, rank: int, step: int, duration_s: float = 0.1) -> None:
        output = StepOutput(step=step, duration_s=duration_s)
        self.workers[rank].send_result(wire.encode(output))


@pytest.fixture
def ends():
    both = Ends()
    yield both
    both.executor.close()
    for worker in both.workers:
        worker.close()


def plan_of(step: int, prompt_tokens: int = 3) -> LockstepPlan:
    """Group 0 has one new request, group 1 idles."""
    new = NewRequest(
        key=0,
        token_ids=tuple(range(prompt_tokens)),
        num_prompt_tokens=prompt_tokens,
        params=SamplingParams(),
    )
    busy = SchedulerOutput(
        step=step,
        new_requests=(new,),
        keys=(0,),
        num_scheduled_tokens=(prompt_tokens,),
        num_computed_tokens=(0,),
        new_block_ids=((0,),),
        samples=(True,),
    )
    return LockstepPlan(
        header=StepHeader(step=step, num_tokens=(prompt_tokens, 0), scheme="flat", reason="why"),
        plans=(busy, SchedulerOutput(step=step)),
        groups=(0, 1),
    )


def test_every_rank_is_sent_its_groups_plan_under_the_same_header(ends):
    plan = plan_of(1)
    ends.executor.submit(plan)
    for rank, worker in enumerate(ends.workers):
        step = wire.decode_rank_step(worker.receive_plan())
        assert step == plan.for_group(rank // TP)
        assert step.header.is_idle(rank // TP) is (rank >= TP)
    with pytest.raises(InternalError, match="lock-step could not be read"):
        wire.decode_rank_step(b"\xc1")


def test_a_step_is_answered_when_the_first_rank_of_every_group_has(ends):
    ends.executor.submit(plan_of(1))
    ends.executor.submit(plan_of(2))
    ends.answer(2, step=1)
    assert not ends.executor.poll(0.05)
    # A group may be a whole answer ahead of what the leader has read from the other.
    ends.answer(2, step=2)
    ends.answer(0, step=1, duration_s=0.3)
    assert ends.executor.poll(5.0)
    output = ends.executor.collect(5.0)
    assert (output.step, output.duration_s, len(output.outputs)) == (1, 0.3, DP)
    ends.answer(0, step=2)
    assert ends.executor.collect(5.0).step == 2


def test_a_long_plan_waits_until_the_step_ahead_has_answered(ends):
    ends.executor.submit(plan_of(1))
    ends.executor.submit(plan_of(2, prompt_tokens=40_000))
    for rank in (0, 2):
        ends.answer(rank, step=1)
    received: list[int] = []

    def read() -> None:
        for worker in ends.workers:
            steps = (wire.decode_rank_step(worker.receive_plan()) for _ in range(2))
            received.extend(step.header.step for step in steps)

    reader = threading.Thread(target=read)
    reader.start()
    assert ends.executor.collect(5.0).step == 1
    reader.join(5.0)
    assert received == [1, 2] * (DP * TP)


def test_wrong_answers_and_silence_are_faults(ends):
    ends.executor.submit(plan_of(1))
    ends.answer(0, step=1)
    with pytest.raises(CollectiveTimeoutError, match=r"groups without an answer: \[1\]"):
        ends.executor.collect(0.05)
    ends.answer(2, step=7)
    with pytest.raises(InternalError, match="Group 1 answered step 7 instead of 1"):
        ends.executor.collect(5.0)
    ends.executor.submit(plan_of(2))
    ends.answer(1, step=2)
    with pytest.raises(InternalError, match="Rank 1 answered; the first rank of group 0 should"):
        ends.executor.collect(5.0)


def test_a_lost_rank_is_named_with_its_node_and_what_its_peers_saw(ends):
    ends.executor.submit(plan_of(1))
    ends.answer(0, step=1)
    ends.workers[3].close()
    seen = WorkerDiedError(
        "Rank 3 (node b) ended while rank 0 (node a) waited in layer 2 dispatch."
    )
    threading.Timer(0.2, ends.workers[0].send_fault, [seen.to_dict()]).start()
    with pytest.raises(WorkerDiedError) as caught:
        ends.executor.collect(5.0)
    assert "Worker rank 3 of 4 (node b) is gone" in caught.value.cause
    assert "Worker rank 0: Rank 3 (node b) ended" in caught.value.cause
    assert "layer 2 dispatch" in caught.value.cause


def test_ranks_that_all_go_at_once_are_not_waited_for(ends):
    ends.executor.submit(plan_of(1))
    for worker in ends.workers:
        worker.close()
    started_s = time.monotonic()
    with pytest.raises(WorkerDiedError, match=r"Worker rank \d of 4 \(node [ab]\) is gone"):
        ends.executor.collect(5.0)
    assert time.monotonic() - started_s < 2.0
