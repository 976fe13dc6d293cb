"""A mixture in memory for about a third of its weights, through gateway, gRPC and HTTP."""

import grpc
import openai
import pytest
import torch
import transformers

from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc
from tests.e2e.conftest import MIXTURE, start_cluster, stop_cluster

pytestmark = pytest.mark.e2e

# In fp32 the weights take 13.3 MiB. 4.8 MiB of them are in memory at a time: embedding and head, a
# ring for the layers' attention, and slots for a few of the 24 experts.
STREAMED = """
cluster: {{name: {name}}}
dashboard: {{port: {dashboard}}}
gateway: {{grpc_port: {grpc}, http_port: {http}}}
models:
  - name: demo-moe
    path: {model}
    engine: offload
    dtype: float32
    offload: {{device_memory: 7680KiB, disk_path: packed, ring_slots: 2}}
    kv_cache: {{memory: 512KiB}}
    limits: {{max_context: 128, max_step_tokens: 32, max_running_requests: 4}}
"""
PROMPTS = ("def ", "import os\n\n\nclass Reader:\n", "for name in names:\n    ")
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed-moe")
    running = start_cluster(folder, "streamed-moe", MIXTURE, STREAMED)
    yield running
    assert stop_cluster(running) == 0


@pytest.fixture(scope="module")
def answers():
    """Tokens and text of each prompt by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MIXTURE)
    model = transformers.AutoModelForCausalLM.from_pretrained(MIXTURE, dtype=torch.float32)
    found = {}
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS
        )
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        found[prompt] = tokens, tokenizer.decode(tokens, skip_special_tokens=True)
    return found


def test_tokens_over_grpc_equal_transformers(cluster, answers):
    sampling = pb.SamplingOptions(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = pb_grpc.PenstockStub(channel)
        calls = {
            prompt: stub.Generate(
                pb.GenerateRequest(model="demo-moe", text=prompt, sampling=sampling), timeout=60
            )
            for prompt in PROMPTS
        }
        for prompt, call in calls.items():
            tokens = [token for piece in call for token in piece.token_ids]
            assert tokens == answers[prompt][0]


def test_texts_over_http_equal_transformers(cluster, answers):
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        for prompt in PROMPTS:
            answer = client.completions.create(
                model="demo-moe",
                prompt=prompt,
                temperature=0,
                max_tokens=NUM_TOKENS,
                extra_body={"ignore_eos": True},
            )
            assert answer.choices[0].text == answers[prompt][1]


def test_the_plan_says_that_it_streams_from_one_store(cluster):
    (replica,) = cluster.replicas()
    assert replica["model"] == "demo-moe"
    assert len(list((cluster.log.parent / "packed").glob("*-1of1.weights"))) == 1
