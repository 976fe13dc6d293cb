"""Faults of a running cluster: whatever dies or hangs, streams go on or end with a code.

Each fault hits a cluster of two replicas while streams run on both, over gRPC and over HTTP. What
their clients get is compared with what they get undisturbed.
"""

import concurrent.futures
import contextlib
import os
import signal
import time

import openai
import pytest

from cluster.base.errors import UnavailableError
from router.client import PenstockClient
from tests.e2e.conftest import MODEL

pytestmark = pytest.mark.e2e

LONG = 400
GREEDY = {"temperature": 0.0, "max_tokens": LONG, "ignore_eos": True}
KINDS = (
    GREEDY,
    GREEDY | {"temperature": 0.9, "seed": 11, "logprobs": 1},
    GREEDY | {"temperature": 0.8, "seed": 12, "n": 2, "frequency_penalty": 0.3},
    GREEDY | {"temperature": 0.9, "seed": 13, "min_tokens": LONG - 20, "stop": ["e", "("]},
)
NUM_STREAMS = 6


@pytest.fixture(scope="module")
def client(cluster):
    with PenstockClient(cluster.grpc) as client:
        yield client


@pytest.fixture(scope="module")
def http(cluster):
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        yield client


def over_grpc(client, index: int):
    """All that one stream says, and the longest silence in it."""
    stream = client.generate(MODEL.name, f"# {index}\n", **KINDS[index % len(KINDS)])
    said, silence_s, heard_s = [], 0.0, None
    for piece in stream:
        now_s = time.monotonic()
        silence_s, heard_s = max(silence_s, now_s - (heard_s or now_s)), now_s
        said.append(piece)
    choices = [
        (
            "".join(piece.text for piece in said if piece.index == index),
            [token for piece in said if piece.index == index for token in piece.token_ids],
            [score for piece in said if piece.index == index for score in piece.logprobs],
            [piece.finish_reason for piece in said if piece.index == index][-1],
        )
        for index in sorted({piece.index for piece in said})
    ]
    usage = said[-1].usage
    return (choices, usage.prompt_tokens, usage.completion_tokens), silence_s


def over_http(client, index: int):
    stream = client.completions.create(
        model=MODEL.name,
        prompt=f"# {index}\n",
        temperature=0.7,
        seed=index,
        max_tokens=LONG,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text, reason = "", None
    for event in stream:
        text += event.choices[0].text
        reason = event.choices[0].finish_reason or reason
    return text, reason


@pytest.fixture(scope="module")
def undisturbed(client, http):
    """What each of the streams says when nothing happens."""
    with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = pool.map(lambda index: over_grpc(client, index)[0], range(NUM_STREAMS))
        return list(streams), [over_http(http, index) for index in range(2)]


def hit_while_streaming(cluster, client, http, choose_pid, signum: int):
    """Stream on both replicas and signal one process.

    Returns:
        What all streams said, the longest silence of one in seconds, the victim and the process.
    """
    cluster.wait_for(lambda: len(cluster.replicas()) == 2)
    with concurrent.futures.ThreadPoolExecutor(NUM_STREAMS + 2) as pool:
        streams = [pool.submit(over_grpc, client, index) for index in range(NUM_STREAMS)]
        others = [pool.submit(over_http, http, index) for index in range(2)]
        cluster.wait_for(lambda: all(r["num_running"] > 1 for r in cluster.replicas()), 20.0)
        victim = cluster.replicas()[0]
        pid = choose_pid(victim)
        os.kill(pid, signum)
        ends = [stream.result(timeout=120) for stream in streams]
        texts = [other.result(timeout=120) for other in others]
    silence_s = max(silence_s for _, silence_s in ends)
    return ([said for said, _ in ends], texts), silence_s, victim, pid


def assert_replaced(cluster, victim) -> None:
    cluster.wait_for(
        lambda: (
            len(cluster.replicas()) == 2
            and victim["epoch"] not in {r["epoch"] for r in cluster.replicas()}
        ),
        90.0,
    )


@pytest.mark.parametrize("who", ["leader", "rank"])
def test_streams_of_a_killed_replica_go_on_to_the_same_end(
    cluster, client, http, undisturbed, who: str
):
    before = cluster.status()["resumed_requests"]
    said, silence_s, victim, _ = hit_while_streaming(
        cluster,
        client,
        http,
        lambda replica: int((replica if who == "leader" else replica["workers"][1])["pid"]),
        signal.SIGKILL,
    )
    assert said == undisturbed
    assert silence_s < 5.0
    assert cluster.status()["resumed_requests"] > before
    assert_replaced(cluster, victim)
    assert over_grpc(client, 0)[0] == undisturbed[0][0]


def test_a_stopped_rank_is_found_by_the_step_deadline(cluster, client, http, undisturbed):
    said, silence_s, victim, pid = hit_while_streaming(
        cluster,
        client,
        http,
        lambda replica: int(replica["workers"][1]["pid"]),
        signal.SIGSTOP,
    )
    try:
        assert said == undisturbed
        # The cluster file sets step_timeout to 5 s.
        assert 3.0 < silence_s < 10.0
        assert_replaced(cluster, victim)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_killed_gateway_comes_back_and_frees_what_it_ran(cluster, client):
    cluster.wait_for(lambda: len(cluster.replicas()) == 2)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(over_grpc, client, index) for index in range(4)]
        cluster.wait_for(lambda: any(r["num_running"] > 0 for r in cluster.replicas()), 20.0)
        os.kill(int(cluster.status()["gateway_pid"]), signal.SIGKILL)
        for stream in streams:
            with pytest.raises(UnavailableError):
                stream.result(timeout=60)

    def answers() -> bool:
        with contextlib.suppress(UnavailableError):
            return over_grpc(client, 1) is not None
        return False

    cluster.wait_for(answers, 60.0)
    cluster.wait_for(
        lambda: all(
            r["num_running"] == 0 and r["kv_blocks_free"] == r["kv_blocks_total"]
            for r in cluster.replicas()
        ),
        10.0,
    )
