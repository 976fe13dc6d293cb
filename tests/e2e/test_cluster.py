"""End to end through real Ray, gateway, gRPC and HTTP: the demo model on two replicas of two ranks.

The oracle is `transformers` on the same checkpoint in fp32.
"""

import concurrent.futures
import json
import re
from pathlib import Path

import grpc
import openai
import pytest
import torch
import transformers
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc
from tests.e2e.conftest import MODEL, penstock

pytestmark = pytest.mark.e2e

PROMPTS = ["def ", "import os\n\n\nclass Reader:\n", "for name in names:\n    "]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def stub(cluster):
    with grpc.insecure_channel(cluster.grpc) as channel:
        yield pb_grpc.PenstockStub(channel)


@pytest.fixture(scope="module")
def client(cluster):
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def oracle():
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)

    def greedy(prompt: str) -> list[int]:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS
        )
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    greedy.tokenizer = tokenizer
    greedy.model = model
    return greedy


def request(prompt: str, **sampling) -> pb.GenerateRequest:
    options = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True} | sampling
    return pb.GenerateRequest(
        model="demo-dense", text=prompt, sampling=pb.SamplingOptions(**options)
    )


def collect(pieces) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def log_lines(pid: int) -> list[dict]:
    """What a process under Ray has logged, other libraries' lines left out."""
    paths = Path("/tmp/ray").glob(f"session_2*/logs/worker-*-{pid}.err")
    newest = max(paths, key=lambda path: path.stat().st_mtime)
    lines = newest.read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith('{"time_s"')]


def test_decisions_of_ranks_are_in_their_logs(cluster):
    replica = cluster.status()["replicas"][0]
    for worker in replica["workers"]:
        said = [line["message"] for line in log_lines(int(worker["pid"]))]
        assert any(text.startswith("kernels: ") for text in said)
        assert any(text.startswith("attention backend ") for text in said)


def test_greedy_tokens_over_grpc_equal_transformers_whatever_runs_beside(stub, oracle):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        runs = list(
            pool.map(
                lambda prompt: collect(stub.Generate(request(prompt), timeout=60)), PROMPTS * 4
            )
        )
    expected = [oracle(prompt) for prompt in PROMPTS]
    assert runs == expected * 4


def test_both_replicas_take_part(cluster, stub):
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda index: collect(stub.Generate(request(f"# {index}\nx = "), timeout=60)),
                range(16),
            )
        )
    cluster.wait_for(lambda: all(r["generated_tokens"] > 0 for r in cluster.replicas()), 10.0)


def test_openai_client_streams_the_same_tokens(client, oracle):
    text = oracle.tokenizer.decode(oracle(PROMPTS[1]))
    extra = {"extra_body": {"ignore_eos": True, "skip_special_tokens": False}}
    whole = client.completions.create(
        model="demo-dense", prompt=PROMPTS[1], temperature=0, max_tokens=NUM_TOKENS, **extra
    )
    assert whole.choices[0].text == text
    assert whole.usage.completion_tokens == NUM_TOKENS
    chunks = list(
        client.completions.create(
            model="demo-dense",
            prompt=PROMPTS[1],
            temperature=0,
            max_tokens=NUM_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            **extra,
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.completion_tokens == NUM_TOKENS
    assert len(chunks) > 5


def test_chat_models_and_embeddings_over_http(client):
    assert [model.id for model in client.models.list()] == ["demo-dense"]
    answer = client.chat.completions.create(
        model="demo-dense",
        messages=[{"role": "user", "content": "Write a sort function."}],
        max_tokens=8,
        seed=3,
        n=2,
        logprobs=True,
        top_logprobs=2,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(len(c.logprobs.content[0].top_logprobs) == 2 for c in answer.choices)
    vectors = client.embeddings.create(model="demo-dense", input=["def f():", "class A:"])
    assert len(vectors.data) == 2
    assert sum(value * value for value in vectors.data[0].embedding) == pytest.approx(1, abs=1e-3)


def test_a_seed_repeats_and_sampled_runs_do_not_depend_on_the_batch(stub):
    sampled = request("def ", temperature=0.9, top_p=0.95, seed=11)
    alone = collect(stub.Generate(sampled, timeout=60))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda _: collect(stub.Generate(sampled, timeout=60)), range(8)))
    assert together == [alone] * 8


def test_scores_equal_transformers(stub, oracle):
    prompt, continuation = "import ", "os\nimport sys\n"
    answer = stub.Score(
        pb.ScoreRequest(
            model="demo-dense", text=prompt, continuations=[pb.EmbedInput(text=continuation)]
        ),
        timeout=60,
    )
    ids = [score.token_id for score in answer.scores[0].logprobs]
    prompt_ids = oracle.tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = oracle.model(torch.tensor([prompt_ids + ids])).logits[0].log_softmax(-1)
    rows = torch.arange(len(prompt_ids) - 1, len(prompt_ids) + len(ids) - 1)
    expected = logits[rows, torch.tensor(ids)]
    measured = torch.tensor([score.logprob for score in answer.scores[0].logprobs])
    torch.testing.assert_close(measured, expected, atol=2e-4, rtol=1e-4)
    assert answer.scores[0].total_logprob == pytest.approx(expected.sum().item(), abs=1e-2)


def test_any_grpc_client_works_through_reflection_and_health(cluster, oracle):
    with grpc.insecure_channel(cluster.grpc) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("penstock.v1.Penstock")
        method = service.FindMethodByName("Generate")
        message = json_format.ParseDict(
            {
                "model": "demo-dense",
                "text": PROMPTS[0],
                "sampling": {"temperature": 0, "maxTokens": NUM_TOKENS, "ignoreEos": True},
            },
            GetMessageClass(method.input_type)(),
        )
        call = channel.unary_stream(
            "/penstock.v1.Penstock/Generate",
            request_serializer=lambda value: value.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        assert collect(call(message, timeout=60)) == oracle(PROMPTS[0])
        health = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10
        )
        assert health.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("way", ["disconnect", "cancel_rpc", "deadline"])
def test_leaving_frees_every_block(cluster, stub, way):
    sampling = {"max_tokens": 900}
    call = request("def " * 20, **sampling)
    call.request_id = f"leave-{way}"
    stream = stub.Generate(call, timeout=0.3 if way == "deadline" else 60)
    code = None
    try:
        for count, _ in enumerate(stream):
            if count == 3 and way == "disconnect":
                stream.cancel()
            if count == 3 and way == "cancel_rpc":
                assert stub.Cancel(pb.CancelRequest(request_id=call.request_id)).cancelled
    except grpc.RpcError as error:
        code = error.code()
    expected = {"disconnect": grpc.StatusCode.CANCELLED, "cancel_rpc": None,
                "deadline": grpc.StatusCode.DEADLINE_EXCEEDED}  # fmt: skip
    assert code == expected[way]
    cluster.wait_for(
        lambda: all(
            r["num_running"] == 0 and r["kv_blocks_free"] == r["kv_blocks_total"]
            for r in cluster.replicas()
        ),
        5.0,
    )


def test_an_answer_has_the_form_it_was_asked_for_on_both_fronts(stub, client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["a", "b"]}},
        "required": ["name", "kind"],
        "additionalProperties": False,
    }
    wish = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    answer = client.chat.completions.create(
        model="demo-dense",
        messages=[{"role": "user", "content": "Name a thing."}],
        response_format=wish,
        max_tokens=100,
        seed=5,
        n=3,
    )
    ended = [each.message.content for each in answer.choices if each.finish_reason == "stop"]
    assert ended
    for text in ended:
        assert list(json.loads(text)) == ["name", "kind"]
    call = request("x = ", ignore_eos=False)
    call.sampling.structured_output.regex = "[0-9]{3}-[0-9]{2}"
    text = "".join(piece.text for piece in stub.Generate(call, timeout=60))
    assert re.fullmatch("[0-9]{3}-[0-9]{2}", text)


def test_errors_carry_code_cause_remedy_and_request_id_on_both_fronts(stub, client):
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(pb.GenerateRequest(model="demo-dens", text="x"), timeout=10))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "demo-dense" in caught.value.details()
    trailers = dict(caught.value.trailing_metadata())
    assert trailers["penstock-error-code"] == "unknown_model"
    assert trailers["penstock-request-id"]
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="demo-dens", prompt="x")
    assert refused.value.code == "unknown_model"
    assert "demo-dense" in refused.value.message
    assert refused.value.response.headers["x-request-id"]


def test_command_line_talks_to_the_cluster(cluster, oracle):
    answer = penstock(
        "generate", PROMPTS[0], "--temperature", "0", "--max-tokens", str(NUM_TOKENS),
        "--ignore-eos", env=cluster.env,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    text = oracle.tokenizer.decode(oracle(PROMPTS[0]), skip_special_tokens=True)
    assert text.strip() in answer.stdout
    status = penstock("status", env=cluster.env)
    assert status.returncode == 0, status.stderr
    assert "2/2" in status.stdout


def test_status_is_json_with_ranks_and_start_up_ledger(cluster):
    status = cluster.status()
    json.dumps(status)
    for replica in status["replicas"]:
        if replica["state"] == "ready":
            assert [worker["rank"] for worker in replica["workers"]] == [0, 1]
            assert replica["startup_s"]
