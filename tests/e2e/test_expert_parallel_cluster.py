"""A mixture-of-experts replica over two expert-parallel ranks, as a user starts it."""

import concurrent.futures
import contextlib
import os
import signal
import time

import grpc
import pytest
import torch
import transformers
from conftest import ROOT, penstock, start_cluster, stop_cluster

from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc

pytestmark = pytest.mark.e2e

MODEL = ROOT / "examples" / "models" / "demo-moe"
PROMPTS = ["def ", "import os\n", "class A:\n    def f(self):\n"]
CLUSTER = """
cluster: {{name: {name}}}
dashboard: {{port: {dashboard}}}
gateway: {{grpc_port: {grpc}, http_port: {http}}}
models:
  - name: demo-moe
    path: {model}
    dtype: float32
    parallel: {{dp: 2, tp: 1}}
    kv_cache: {{memory: 8MiB}}
    moe:
      redundant_experts: 1
      balance: {{enabled: true, interval: 1s, max_moves: 4}}
      failover: {{enabled: false}}
    limits: {{max_step_tokens: 128}}
"""


@pytest.fixture(scope="module")
def moe_cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("moe")
    running = start_cluster(folder, "e2e-moe", MODEL, CLUSTER)
    try:
        yield running
    finally:
        stop_cluster(running)


@pytest.fixture
def stub(moe_cluster):
    with grpc.insecure_channel(moe_cluster.grpc) as channel:
        yield pb_grpc.PenstockStub(channel)


def stream(stub, text: str, max_tokens: int) -> tuple[list[int], grpc.RpcError | None]:
    """Tokens of one greedy stream, and how it failed if it did."""
    request = pb.GenerateRequest(
        model="demo-moe",
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


def test_tokens_are_those_of_transformers_whatever_else_runs(moe_cluster, stub):
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda text: stream(stub, text, 24), PROMPTS * 3))
    for text, (tokens, error) in zip(PROMPTS * 3, answers, strict=True):
        prompt = tokenizer(text)["input_ids"]
        expected = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=24, min_new_tokens=24
        )
        assert error is None
        assert tokens == expected[0, len(prompt) :].tolist()


def test_status_shows_the_groups_of_ranks(moe_cluster):
    (replica,) = moe_cluster.replicas()
    assert [(worker["rank"], worker["group"]) for worker in replica["workers"]] == [(0, 0), (1, 1)]
    table = penstock("status", env={**moe_cluster.env, "COLUMNS": "200"}).stdout
    first, second = (worker["pid"] for worker in replica["workers"])
    assert f"{first} | {second}" in table
    assert "expert_parallel" in table


def test_the_load_of_each_expert_is_in_status_and_metrics(moe_cluster, stub):
    stream(stub, "def ", 8)

    def layers():
        return moe_cluster.replicas()[0]["expert_layers"]

    def totals():
        return {sum(layer["rows"]) for layer in layers()}

    # A look may fall into a step; the last one does not.
    moe_cluster.wait_for(lambda: len(totals()) == 1 and min(totals()) > 0, 30.0)
    assert all(layer["imbalance"] >= 1.0 for layer in layers())
    assert moe_cluster.replicas()[0]["expert_rows_dropped"] == 0


def test_experts_follow_the_load_and_no_token_changes(moe_cluster, stub):
    moe_cluster.wait_for(lambda: len(moe_cluster.replicas()) == 1, 90.0)
    (first, _), tokens = stream(stub, "def ", 200), set()

    def moved() -> bool:
        answer, error = stream(stub, "def ", 200)
        assert error is None
        tokens.add(tuple(answer))
        return moe_cluster.replicas()[0]["expert_table"] > 0

    moe_cluster.wait_for(moved, 60.0)
    moved()
    assert tokens == {tuple(first)}
    assert moe_cluster.replicas()[0]["expert_moves"] >= 0


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_hear_which_rank_was_lost_and_the_replica_returns(moe_cluster, stub, signum):
    moe_cluster.wait_for(lambda: len(moe_cluster.replicas()) == 1, 90.0)
    (victim,) = moe_cluster.replicas()
    pid = int(victim["workers"][1]["pid"])
    try:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(stream, stub, f"# {index}\n", 450) for index in range(4)]
            moe_cluster.wait_for(lambda: moe_cluster.replicas()[0]["num_running"] == 4, 20.0)
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
    moe_cluster.wait_for(
        lambda: [r["epoch"] for r in moe_cluster.replicas()] not in ([], [victim["epoch"]]), 90.0
    )
    # The gateway may hear of the new replica a moment after the directory.
    moe_cluster.wait_for(lambda: len(stream(stub, "def ", 24)[0]) == 24, 10.0)


RESUMING = CLUSTER.replace("max_step_tokens: 128", "max_step_tokens: 128, max_rank_restarts: 3")


def test_no_request_is_lost_with_a_rank_when_the_file_allows_to_replace_it(tmp_path):
    running = start_cluster(tmp_path, "e2e-resume", MODEL, RESUMING)
    try:
        with grpc.insecure_channel(running.grpc) as channel:
            stub = pb_grpc.PenstockStub(channel)
            prompts = [f"# {index}\n" for index in range(4)]
            expected = [stream(stub, prompt, 300)[0] for prompt in prompts]
            (victim,) = running.replicas()
            for signum in (signal.SIGKILL, signal.SIGSTOP):
                with concurrent.futures.ThreadPoolExecutor(4) as pool:
                    streams = [pool.submit(stream, stub, prompt, 300) for prompt in prompts]
                    running.wait_for(lambda: running.replicas()[0]["num_running"] == 4, 20.0)
                    workers = running.replicas()[0]["workers"]
                    os.kill(int(workers[1]["pid"]), signum)
                    answers = [each.result(timeout=90) for each in streams]
                assert answers == [(tokens, None) for tokens in expected]
                running.wait_for(lambda old=workers: running.replicas()[0]["workers"] != old, 20.0)
            assert [replica["epoch"] for replica in running.replicas()] == [victim["epoch"]]
    finally:
        stop_cluster(running)


SURVIVING = CLUSTER.replace("failover: {{enabled: false}}", "failover: {{lost_groups: 1}}")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_the_ranks_that_are_left_serve_all_requests_and_the_lost_one_comes_back(tmp_path, signum):
    running = start_cluster(tmp_path, "e2e-survive", MODEL, SURVIVING)
    try:
        with grpc.insecure_channel(running.grpc) as channel:
            stub = pb_grpc.PenstockStub(channel)
            prompts = [f"# {index}\n" for index in range(4)]
            expected = [stream(stub, prompt, 300)[0] for prompt in prompts]
            (before,) = running.replicas()
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                streams = [pool.submit(stream, stub, prompt, 300) for prompt in prompts]
                running.wait_for(lambda: running.replicas()[0]["num_running"] == 4, 20.0)
                os.kill(int(before["workers"][1]["pid"]), signum)
                running.wait_for(lambda: running.replicas()[0]["loss"] is not None, 20.0)
                table = penstock("status", env={**running.env, "COLUMNS": "200"}).stdout
                answers = [each.result(timeout=90) for each in streams]
            assert answers == [(tokens, None) for tokens in expected]
            assert "degraded" in table
            assert "serves without rank 1" in table
            assert "1 of 2 groups, 50% of its cache" in table
            running.wait_for(lambda: running.replicas()[0]["loss"] is None, 60.0)
            (after,) = running.replicas()
            assert after["epoch"] == before["epoch"]
            assert after["workers"][0]["pid"] == before["workers"][0]["pid"]
            assert after["workers"][1]["pid"] != before["workers"][1]["pid"]
            # A stopped one too: its memory is counted for its successor.
            assert not os.path.exists(f"/proc/{before['workers'][1]['pid']}/exe")
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                again = list(pool.map(lambda prompt: stream(stub, prompt, 300), prompts))
            assert again == [(tokens, None) for tokens in expected]
    finally:
        stop_cluster(running)
