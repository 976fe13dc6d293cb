"""The step channel over real sockets: order, big frames, death, faults, impostors, deadlines."""

import dataclasses
import socket
import struct
import threading
import time

import pytest

from cluster.base.errors import (
    CollectiveTimeoutError,
    CorruptWeightsError,
    InternalError,
    WorkerDiedError,
)
from replicas.api import Pooling, SamplingParams, TokenLogprob
from replicas.engine.scheduler_output import (
    NewRequest,
    RequestResult,
    SchedulerOutput,
    StepOutput,
)
from replicas.worker import wire
from replicas.worker.frames import FrameKind, FrameSocket
from replicas.worker.leader_link import LeaderLink
from replicas.worker.link_executor import LinkExecutor
from replicas.worker.link_listener import LinkListener
from replicas.worker.worker_link import WorkerLink

PLAN = SchedulerOutput(
    step=7,
    new_requests=(
        NewRequest(
            key=3,
            token_ids=(1, 2, 3),
            num_prompt_tokens=2,
            params=SamplingParams(logit_bias=((5, -1.5),), seed=-(2**62), logprobs=2),
            pooling=Pooling.MEAN,
            eos_token_ids=(0,),
        ),
    ),
    keys=(3, 4),
    num_scheduled_tokens=(3, 1),
    num_computed_tokens=(0, 17),
    new_block_ids=((0, 1), ()),
    replaced_blocks=((4, 1, 8),),
    block_copies=((2, 8),),
    samples=(True, False),
    finished_keys=(1,),
)
RESULT = StepOutput(
    step=7,
    results=(
        RequestResult(
            key=3,
            token_ids=(11,),
            logprobs=(
                TokenLogprob(token_id=11, logprob=-0.25, rank=1, top=((11, -0.25), (4, -2.0))),
            ),
            embedding=(0.5, -1.0),
        ),
    ),
    duration_s=0.25,
    timings_s={"forward": 0.2},
)


def open_links(size: int, host: str | None = None) -> tuple[LeaderLink, list[WorkerLink]]:
    listener = LinkListener(size=size, epoch="e1", secret="s", host=host)
    links: list[WorkerLink] = []

    def join() -> None:
        for rank in reversed(range(size)):  # ranks may come in any order
            links.insert(
                0,
                WorkerLink.connect(
                    listener.address, rank=rank, epoch="e1", secret="s", timeout_s=5.0
                ),
            )

    thread = threading.Thread(target=join)
    thread.start()
    leader = listener.accept_all(timeout_s=5.0)
    thread.join()
    listener.close()
    return leader, links


def test_codec_round_trip():
    assert wire.decode_plan(wire.encode(PLAN)) == PLAN
    assert wire.decode_result(wire.encode(RESULT)) == RESULT


@pytest.mark.parametrize("payload", [b"", b"\xc1", wire.encode(RESULT)[:-3], b"\x93\x01\x02\x03"])
def test_codec_refuses_other_bytes(payload):
    with pytest.raises(InternalError, match="could not be read"):
        wire.decode_plan(payload)


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_plans_reach_every_rank_in_order_and_rank_0_answers(host):
    leader, workers = open_links(3, host)
    executor = LinkExecutor(leader)
    executor.submit(PLAN)
    for worker in workers:
        assert wire.decode_plan(worker.receive_plan()) == PLAN
    workers[0].send_result(wire.encode(RESULT))
    assert executor.collect(timeout_s=5.0) == RESULT
    executor.close()
    assert all(worker.receive_plan() is None for worker in workers)


def test_poll_tells_whether_an_answer_is_there_and_never_minds_lateness():
    leader, (worker,) = open_links(1)
    executor = LinkExecutor(leader)
    executor.submit(PLAN)
    for timeout_s in (0.0, 0.0004, 0.0012, 0.05):
        started_s = time.monotonic()
        assert not executor.poll(timeout_s)
        assert time.monotonic() - started_s >= timeout_s * 0.9
    worker.send_result(wire.encode(RESULT))
    started_s = time.monotonic()
    assert executor.poll(30.0)
    assert time.monotonic() - started_s < 5.0
    assert executor.collect(timeout_s=5.0) == RESULT


def test_a_nap_ends_with_an_answer_not_with_a_sign_and_never_lasts():
    leader, (worker,) = open_links(1)
    started_s = time.monotonic()
    leader.nap()
    assert 0.001 < time.monotonic() - started_s < 1.0
    worker.send_nearly_done()
    leader.nap()
    worker.send_result(wire.encode(RESULT))
    leader.nap()
    assert wire.decode_result(leader.receive_result(5.0)) == RESULT


def test_with_its_next_step_sent_a_rank_is_awaited_all_the_same():
    leader, (worker,) = open_links(1)
    executor = LinkExecutor(leader)
    executor.submit(PLAN)
    executor.submit(dataclasses.replace(PLAN, step=8))
    late = threading.Timer(0.1, worker.send_result, (wire.encode(RESULT),))
    late.start()
    assert executor.collect(timeout_s=5.0) == RESULT
    worker.close()
    with pytest.raises(WorkerDiedError):
        executor.collect(timeout_s=5.0)


def test_plans_that_arrive_together_are_read_one_by_one():
    leader, (worker,) = open_links(1)
    plans = [dataclasses.replace(PLAN, step=step) for step in range(50)]
    for plan in plans:
        leader.send_plan(wire.encode(plan), timeout_s=5.0)
    assert [wire.decode_plan(worker.receive_plan()) for _ in plans] == plans


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_plan_that_comes_in_two_parts_is_read_whole(cut):
    ours, theirs = socket.socketpair()
    reader = FrameSocket(theirs, reads_ahead=True)
    data = struct.pack("<IB", 6, FrameKind.PLAN) + b"a plan" + struct.pack("<IB", 0, FrameKind.STOP)
    ours.sendall(data[:cut])
    rest = threading.Timer(0.02, ours.sendall, (data[cut:],))
    rest.start()
    assert reader.receive(None) == (FrameKind.PLAN, b"a plan")
    assert reader.receive(None) == (FrameKind.STOP, b"")
    rest.join()
    ours.sendall(struct.pack("<IB", 0, 99))
    with pytest.raises(ConnectionError, match="not a frame: kind 99"):
        reader.receive(None)
    ours.close()
    with pytest.raises(ConnectionError):
        reader.receive(None)
    reader.close()


def test_a_sign_ends_a_poll_once_and_leaves_the_answer_alone():
    leader, workers = open_links(2)
    executor = LinkExecutor(leader)
    executor.submit(PLAN)
    workers[0].send_nearly_done()
    started_s = time.monotonic()
    assert not executor.poll(30.0)
    assert time.monotonic() - started_s < 5.0
    assert not executor.poll(0.01)
    workers[0].send_nearly_done()
    workers[0].send_result(wire.encode(RESULT))
    assert executor.poll(30.0), "the answer is there as well"
    assert executor.collect(timeout_s=5.0) == RESULT


def test_a_sign_that_nobody_waited_for_is_passed_over():
    leader, (worker,) = open_links(1)
    executor = LinkExecutor(leader)
    executor.submit(PLAN)
    worker.send_nearly_done()
    worker.send_result(wire.encode(RESULT))
    assert executor.collect(timeout_s=5.0) == RESULT


def test_a_loss_beside_a_sign_is_seen():
    leader, workers = open_links(2)
    executor = LinkExecutor(leader)
    executor.submit(PLAN)
    workers[0].send_nearly_done()
    workers[1].close()
    while not executor.poll(0.0):
        pass
    with pytest.raises(WorkerDiedError, match="rank 1 of 2"):
        executor.collect(timeout_s=5.0)


def test_a_lost_rank_ends_a_poll_and_collect_names_it():
    leader, workers = open_links(2)
    executor = LinkExecutor(leader)
    executor.submit(PLAN)
    threading.Timer(0.1, workers[1].close).start()
    assert executor.poll(30.0)
    with pytest.raises(WorkerDiedError, match="rank 1 of 2"):
        executor.collect(timeout_s=5.0)


def test_a_rank_knows_how_long_it_waited_for_its_plan():
    leader, (worker,) = open_links(1)
    waits = []
    for _ in range(5):  # a busy machine may hold up one of them
        leader.send_plan(wire.encode(PLAN), 1.0)
        time.sleep(0.02)
        worker.receive_plan()
        waits.append(worker.waited_s)
    assert min(waits) < 0.01, "they were there"
    threading.Timer(0.3, leader.send_plan, [wire.encode(PLAN), 1.0]).start()
    worker.receive_plan()
    assert worker.waited_s > 0.05


def test_a_plan_on_top_is_in_the_socket_before_the_answer():
    leader, (worker,) = open_links(1)
    executor = LinkExecutor(leader)
    second = dataclasses.replace(PLAN, step=8)
    executor.submit(PLAN)
    executor.submit(second)
    assert wire.decode_plan(worker.receive_plan()) == PLAN
    assert wire.decode_plan(worker.receive_plan()) == second
    for step in (7, 8):
        worker.send_result(wire.encode(dataclasses.replace(RESULT, step=step)))
    assert [executor.collect(timeout_s=5.0).step for _ in range(2)] == [7, 8]


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_a_long_plan_on_top_and_a_long_answer_do_not_wait_for_each_other(host):
    leader, (worker,) = open_links(1, host)
    executor = LinkExecutor(leader)
    new = dataclasses.replace(PLAN.new_requests[0], token_ids=tuple(range(400_000)))
    long_plan = dataclasses.replace(PLAN, step=8, new_requests=(new,))
    scores = (TokenLogprob(token_id=1, logprob=-0.5, rank=1),) * 100_000
    long_result = dataclasses.replace(
        RESULT, results=(RequestResult(key=3, prompt_logprobs=scores),)
    )
    received = []

    def rank() -> None:
        received.append(wire.decode_plan(worker.receive_plan()).step)
        time.sleep(0.1)  # the leader submits meanwhile
        worker.send_result(wire.encode(long_result))
        received.append(wire.decode_plan(worker.receive_plan()))

    thread = threading.Thread(target=rank)
    thread.start()
    executor.submit(PLAN)
    executor.submit(long_plan)
    assert executor.collect(timeout_s=5.0) == long_result
    thread.join(5.0)
    assert received == [7, long_plan]


def test_a_frame_larger_than_any_socket_buffer_arrives_whole():
    leader, (worker,) = open_links(1)
    payload = bytes(range(256)) * 40_000
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(bytes(worker.receive_plan())))
    thread.start()
    leader.send_plan(payload, timeout_s=5.0)
    thread.join(5.0)
    assert received == [payload]


def test_death_of_a_silent_rank_is_seen_at_once_and_named():
    leader, workers = open_links(3)
    leader.send_plan(b"x", timeout_s=1.0)
    threading.Timer(0.1, workers[2].close).start()
    started_s = time.monotonic()
    with pytest.raises(WorkerDiedError, match="rank 2 of 3"):
        leader.receive_result(timeout_s=30.0)
    assert time.monotonic() - started_s < 5.0


def test_a_rank_that_hangs_is_a_timeout():
    leader, _workers = open_links(2)
    with pytest.raises(CollectiveTimeoutError, match=r"within 0\.2 s"):
        leader.receive_result(timeout_s=0.2)


def test_the_root_cause_of_a_rank_reaches_the_leader():
    leader, workers = open_links(2)
    workers[1].send_fault(CorruptWeightsError("tensor x is NaN", "fetch it again").to_dict())
    workers[1].close()
    workers[0].send_result(wire.encode(RESULT))
    with pytest.raises(CorruptWeightsError, match="rank 1: tensor x is NaN") as caught:
        leader.receive_result(timeout_s=5.0)
    assert caught.value.remedy == "fetch it again"


def test_sending_to_a_dead_rank_tells_its_last_words():
    leader, (worker,) = open_links(1)
    worker.send_fault(CorruptWeightsError("bad file").to_dict())
    worker.close()

    def send_until_it_shows() -> None:
        for _ in range(50):
            leader.send_plan(b"x" * 100_000, timeout_s=1.0)

    with pytest.raises((CorruptWeightsError, WorkerDiedError)):
        send_until_it_shows()


def test_an_answer_to_another_step_is_refused():
    leader, (worker,) = open_links(1)
    executor = LinkExecutor(leader)
    executor.submit(SchedulerOutput(step=8))
    worker.send_result(wire.encode(RESULT))
    with pytest.raises(InternalError, match="step 7 instead of 8"):
        executor.collect(timeout_s=5.0)


@pytest.mark.parametrize(("epoch", "secret"), [("e1", "wrong"), ("e0", "s")])
def test_strangers_and_late_ranks_of_another_epoch_are_dropped(epoch, secret):
    listener = LinkListener(size=1, epoch="e1", secret="s", host="127.0.0.1")
    stranger = WorkerLink.connect(
        listener.address, rank=0, epoch=epoch, secret=secret, timeout_s=5.0
    )
    with pytest.raises(CollectiveTimeoutError, match=r"ranks \[0\] did not connect"):
        listener.accept_all(timeout_s=0.5)
    assert stranger.receive_plan() is None
    listener.close()


def test_closing_the_listener_ends_the_wait():
    listener = LinkListener(size=1, epoch="e1", secret="s")
    threading.Timer(0.1, listener.close).start()
    started_s = time.monotonic()
    with pytest.raises(CollectiveTimeoutError):
        listener.accept_all(timeout_s=60.0)
    assert time.monotonic() - started_s < 5.0
