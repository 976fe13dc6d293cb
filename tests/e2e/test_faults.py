"""Faults of a running cluster: whatever dies or hangs, streams end with a code and service returns.

Each fault hits a cluster of two replicas; the other replica's requests must not notice.
"""

import concurrent.futures
import contextlib
import os
import signal
import time

import grpc
import pytest

from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc

pytestmark = pytest.mark.e2e

LONG = 600


@pytest.fixture
def stub(cluster):
    with grpc.insecure_channel(cluster.grpc) as channel:
        yield pb_grpc.PenstockStub(channel)


def until_end(stub, index: int):
    """(status code or None, our code, when, tokens) of one long stream."""
    request = pb.GenerateRequest(
        model="demo-dense",
        text=f"# {index}\n",
        sampling=pb.SamplingOptions(temperature=0, max_tokens=LONG, ignore_eos=True),
    )
    num_tokens = 0
    try:
        for piece in stub.Generate(request, timeout=90):
            num_tokens += len(piece.token_ids)
    except grpc.RpcError as error:
        trailers = dict(error.trailing_metadata())
        return error.code(), trailers.get("penstock-error-code"), time.monotonic(), num_tokens
    return None, None, time.monotonic(), num_tokens


def hit_while_streaming(cluster, stub, choose_pid, signum: int):
    """Stream on both replicas, signal one process, return (signal time, ends, victim)."""
    cluster.wait_for(lambda: len(cluster.replicas()) == 2)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(until_end, stub, index) for index in range(8)]
        cluster.wait_for(lambda: all(r["num_running"] > 0 for r in cluster.replicas()), 20.0)
        victim = cluster.replicas()[0]
        pid = choose_pid(victim)
        hit_s = time.monotonic()
        os.kill(pid, signum)
        ends = [stream.result(timeout=120) for stream in streams]
    return hit_s, ends, victim, pid


def assert_one_replica_failed(hit_s: float, ends, codes: set[str], limit_s: float) -> None:
    failed = [end for end in ends if end[0] is not None]
    whole = [end for end in ends if end[0] is None]
    assert failed
    assert whole
    assert {num_tokens for *_, num_tokens in whole} == {LONG}
    for status, code, ended_s, _ in failed:
        assert status is grpc.StatusCode.UNAVAILABLE
        assert code in codes
        assert ended_s - hit_s < limit_s


def assert_replaced(cluster, stub, victim) -> None:
    cluster.wait_for(
        lambda: (
            len(cluster.replicas()) == 2
            and victim["epoch"] not in {r["epoch"] for r in cluster.replicas()}
        ),
        90.0,
    )
    assert until_end(stub, 99)[3] == LONG


def test_a_killed_leader(cluster, stub):
    hit_s, ends, victim, _ = hit_while_streaming(
        cluster, stub, lambda replica: int(replica["pid"]), signal.SIGKILL
    )
    assert_one_replica_failed(hit_s, ends, {"unavailable", "worker_died"}, limit_s=2.0)
    assert_replaced(cluster, stub, victim)


def test_a_stopped_rank_is_found_by_the_step_deadline(cluster, stub):
    hit_s, ends, victim, pid = hit_while_streaming(
        cluster, stub, lambda replica: int(replica["workers"][1]["pid"]), signal.SIGSTOP
    )
    try:
        # The cluster file sets step_timeout to 5 s.
        assert_one_replica_failed(hit_s, ends, {"collective_timeout", "worker_died"}, limit_s=8.0)
        assert_replaced(cluster, stub, victim)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_gateway_comes_back_and_frees_what_it_ran(cluster, stub):
    cluster.wait_for(lambda: len(cluster.replicas()) == 2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(until_end, stub, index) for index in range(4)]
        cluster.wait_for(lambda: any(r["num_running"] > 0 for r in cluster.replicas()), 20.0)
        os.kill(int(cluster.status()["gateway_pid"]), signal.SIGKILL)
        ends = [stream.result(timeout=60) for stream in streams]
    assert all(status is grpc.StatusCode.UNAVAILABLE for status, *_ in ends)
    cluster.wait_for(lambda: until_end(stub, 1)[0] is None, 60.0)
    cluster.wait_for(
        lambda: all(
            r["num_running"] == 0 and r["kv_blocks_free"] == r["kv_blocks_total"]
            for r in cluster.replicas()
        ),
        10.0,
    )
