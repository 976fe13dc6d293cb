"""Mixture-of-experts replicas over two expert-parallel ranks each, as a user starts them.

One cluster serves the same checkpoint three times, by what happens when a rank is lost: the replica
starts anew (and experts follow the load meanwhile), all ranks are replaced, or the others go on.
"""

import concurrent.futures
import contextlib
import os
import signal
import time

import grpc
import pytest
import torch
import transformers

from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc
from tests.e2e.conftest import MIXTURE, penstock, start_cluster, stop_cluster

pytestmark = pytest.mark.e2e

PROMPTS = ["def ", "import os\n", "class A:\n    def f(self):\n"]
MOVING, RESUMING, SURVIVING = "demo-moe", "resuming", "surviving"
CLUSTER = """
cluster: {{name: {name}}}
dashboard: {{port: {dashboard}}}
gateway: {{grpc_port: {grpc}, http_port: {http}}}
models:
  - &moving
    name: demo-moe
    path: {model}
    dtype: float32
    parallel: {{dp: 2, tp: 1}}
    kv_cache: {{memory: 8MiB}}
    moe: &moe
      redundant_experts: 1
      balance: {{enabled: true, interval: 1s, max_moves: 4}}
      failover: {{enabled: false}}
    limits: {{max_step_tokens: 128}}
  - <<: *moving
    name: resuming
    limits: {{max_step_tokens: 128, max_rank_restarts: 3}}
  - <<: *moving
    name: surviving
    moe: {{<<: *moe, failover: {{lost_groups: 1}}}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = start_cluster(tmp_path_factory.mktemp("moe"), "e2e-moe", MIXTURE, CLUSTER)
    try:
        yield running
    finally:
        stop_cluster(running)


@pytest.fixture
def stub(cluster):
    with grpc.insecure_channel(cluster.grpc) as channel:
        yield pb_grpc.PenstockStub(channel)


def stream(
    stub, text: str, max_tokens: int, model: str = MOVING
) -> tuple[list[int], grpc.RpcError | None]:
    """Tokens of one greedy stream, and how it failed if it did."""
    request = pb.GenerateRequest(
        model=model,
        text=text,
        sampling=pb.SamplingOptions(temperature=0, max_tokens=max_tokens, ignore_eos=True),
    )
    tokens: list[int] = []
    try:
        for piece in stub.Generate(request, timeout=90):
            tokens += piece.token_ids
    except grpc.RpcError as error:
        return tokens, error
    return tokens, None


def test_tokens_are_those_of_transformers_whatever_else_runs(cluster, stub):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MIXTURE)
    model = transformers.AutoModelForCausalLM.from_pretrained(MIXTURE, dtype=torch.float32)
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda text: stream(stub, text, 24), PROMPTS * 3))
    for text, (tokens, error) in zip(PROMPTS * 3, answers, strict=True):
        prompt = tokenizer(text)["input_ids"]
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, min_new_tokens=24
        )
        assert error is None
        assert tokens == expected[0, len(prompt) :].tolist()


def test_status_shows_the_groups_of_ranks(cluster):
    (replica,) = cluster.replicas(MOVING)
    assert [(worker["rank"], worker["group"]) for worker in replica["workers"]] == [(0, 0), (1, 1)]
    table = penstock("status", env={**cluster.env, "COLUMNS": "200"}).stdout
    first, second = (worker["pid"] for worker in replica["workers"])
    assert f"{first} | {second}" in table
    assert "expert_parallel" in table


def test_the_load_of_each_expert_is_in_status_and_metrics(cluster, stub):
    stream(stub, "def ", 8)

    def layers():
        return cluster.replicas(MOVING)[0]["expert_layers"]

    def totals():
        return {sum(layer["rows"]) for layer in layers()}

    # A look may fall into a step; the last one does not.
    cluster.wait_for(lambda: len(totals()) == 1 and min(totals()) > 0, 30.0)
    assert all(layer["imbalance"] >= 1.0 for layer in layers())
    assert cluster.replicas(MOVING)[0]["expert_rows_dropped"] == 0


def test_experts_follow_the_load_and_no_token_changes(cluster, stub):
    cluster.wait_for(lambda: len(cluster.replicas(MOVING)) == 1, 90.0)
    (first, _), tokens = stream(stub, "def ", 200), set()

    def moved() -> bool:
        answer, error = stream(stub, "def ", 200)
        assert error is None
        tokens.add(tuple(answer))
        return cluster.replicas(MOVING)[0]["expert_table"] > 0

    cluster.wait_for(moved, 60.0)
    moved()
    assert tokens == {tuple(first)}
    assert cluster.replicas(MOVING)[0]["expert_moves"] >= 0


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_hear_which_rank_was_lost_and_the_replica_returns(cluster, stub, signum):
    cluster.wait_for(lambda: len(cluster.replicas(MOVING)) == 1, 90.0)
    (victim,) = cluster.replicas(MOVING)
    pid = int(victim["workers"][1]["pid"])
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(stream, stub, f"# {index}\n", 450) for index in range(4)]
            cluster.wait_for(lambda: cluster.replicas(MOVING)[0]["num_running"] == 4, 20.0)
            os.kill(pid, signum)
            hit_s = time.monotonic()
            ends = [each.result(timeout=60) for each in streams]
            ended_s = time.monotonic()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert ended_s - hit_s < 6.0
    for _, error in ends:
        assert error is not None
        assert dict(error.trailing_metadata())["penstock-error-code"] == "worker_died"
        assert "ank 1" in error.details()
        assert "layer" in error.details()
    cluster.wait_for(
        lambda: [r["epoch"] for r in cluster.replicas(MOVING)] not in ([], [victim["epoch"]]), 90.0
    )
    # The gateway may hear of the new replica a moment after the directory.
    cluster.wait_for(lambda: len(stream(stub, "def ", 24)[0]) == 24, 10.0)


@contextlib.contextmanager
def four_streams(stub, model: str):
    """Futures of four long streams that run together."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        yield [pool.submit(stream, stub, f"# {index}\n", 300, model) for index in range(4)]


def one_by_one(stub, model: str):
    """The same four streams, each alone."""
    ends = [stream(stub, f"# {index}\n", 300, model) for index in range(4)]
    assert {error for _, error in ends} == {None}
    return ends


def test_no_request_is_lost_with_a_rank_when_the_file_allows_to_replace_it(cluster, stub):
    expected = one_by_one(stub, RESUMING)
    (victim,) = cluster.replicas(RESUMING)
    for signum in (signal.SIGKILL, signal.SIGSTOP):
        with four_streams(stub, RESUMING) as streams:
            cluster.wait_for(lambda: cluster.replicas(RESUMING)[0]["num_running"] == 4, 20.0)
            workers = cluster.replicas(RESUMING)[0]["workers"]
            os.kill(int(workers[1]["pid"]), signum)
            assert [each.result(timeout=90) for each in streams] == expected
        cluster.wait_for(lambda old=workers: cluster.replicas(RESUMING)[0]["workers"] != old, 20.0)
    assert [replica["epoch"] for replica in cluster.replicas(RESUMING)] == [victim["epoch"]]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_the_ranks_that_are_left_serve_all_requests_and_the_lost_one_comes_back(
    cluster, stub, signum
):
    expected = one_by_one(stub, SURVIVING)
    (before,) = cluster.replicas(SURVIVING)
    with four_streams(stub, SURVIVING) as streams:
        cluster.wait_for(lambda: cluster.replicas(SURVIVING)[0]["num_running"] == 4, 20.0)
        os.kill(int(before["workers"][1]["pid"]), signum)
        cluster.wait_for(lambda: cluster.replicas(SURVIVING)[0]["loss"] is not None, 20.0)
        table = penstock("status", env={**cluster.env, "COLUMNS": "200"}).stdout
        assert [each.result(timeout=90) for each in streams] == expected
    assert "degraded" in table
    assert "serves without rank 1" in table
    assert "1 of 2 groups, 50% of its cache" in table
    cluster.wait_for(lambda: cluster.replicas(SURVIVING)[0]["loss"] is None, 60.0)
    (after,) = cluster.replicas(SURVIVING)
    assert after["epoch"] == before["epoch"]
    assert after["workers"][0]["pid"] == before["workers"][0]["pid"]
    assert after["workers"][1]["pid"] != before["workers"][1]["pid"]
    # A stopped one too: its memory is counted for its successor.
    assert not os.path.exists(f"/proc/{before['workers'][1]['pid']}/exe")
    with four_streams(stub, SURVIVING) as streams:
        assert [each.result(timeout=90) for each in streams] == expected
