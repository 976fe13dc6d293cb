"""A model that streams two fifths of itself at a time, through gateway, gRPC and HTTP."""

import grpc
import openai
import pytest
import torch
import transformers

from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc
from tests.e2e.conftest import MODEL, penstock, start_cluster, stop_cluster

pytestmark = pytest.mark.e2e

# In fp32 the weights take 11 MiB: two layers of 2.3 MiB are in memory at a time, and nothing else.
OFFLOADED = """
cluster: {{name: {name}}}
dashboard: {{port: {dashboard}}}
gateway: {{grpc_port: {grpc}, http_port: {http}}}
models:
  - name: demo-dense
    path: {model}
    engine: offload
    dtype: float32
    offload: {{device_memory: 9400KiB, disk_path: packed, ring_slots: 2, resident: 0}}
    kv_cache: {{memory: 512KiB}}
    limits: {{max_context: 128, max_step_tokens: 64, max_running_requests: 4}}
"""
PROMPTS = ("def ", "import os\n\n\nclass Reader:\n", "for name in names:\n    ")
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = start_cluster(tmp_path_factory.mktemp("offload"), "offload", MODEL, OFFLOADED)
    yield running
    assert stop_cluster(running) == 0


def expected() -> dict:
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    answers = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS
        )
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        answers[prompt] = tokens, tokenizer.decode(tokens, skip_special_tokens=True)
    return answers


def test_answers_of_a_streamed_model_equal_transformers(cluster):
    answers = expected()
    sampling = pb.SamplingOptions(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = pb_grpc.PenstockStub(channel)
        calls = {
            prompt: stub.Generate(
                pb.GenerateRequest(model="demo-dense", text=prompt, sampling=sampling), timeout=60
            )
            for prompt in PROMPTS
        }
        for prompt, call in calls.items():
            tokens = [token for piece in call for token in piece.token_ids]
            assert tokens == answers[prompt][0]
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        for prompt in PROMPTS:
            answer = client.completions.create(
                model="demo-dense",
                prompt=prompt,
                temperature=0,
                max_tokens=NUM_TOKENS,
                extra_body={"ignore_eos": True},
            )
            assert answer.choices[0].text == answers[prompt][1]


def test_the_store_is_where_the_file_says_and_status_knows_the_replica(cluster):
    packed = cluster.log.parent / "packed"
    assert len(list(packed.glob("*-1of1.weights"))) == 1
    assert len(cluster.replicas()) == 1
    assert penstock("status", env=cluster.env).returncode == 0
