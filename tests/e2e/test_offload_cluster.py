"""Models that stream their weights, through gateway, gRPC and HTTP: all in one cluster."""

import grpc
import openai
import pytest
import transformers

from router.proto import penstock_pb2 as pb
from router.proto import penstock_pb2_grpc as pb_grpc
from tests.e2e.conftest import MIXTURE, MODEL, penstock, start_cluster, stop_cluster
from tests.support.foreign_models import write_foreign
from tests.support.greedy_answers import (
    NUM_TOKENS,
    PROMPTS,
    check_texts_over_http,
    check_tokens_over_grpc,
    transformers_answers,
)

pytestmark = pytest.mark.e2e

# In fp32 the dense weights take 11 MiB: two layers of 2.3 MiB are in memory at a time, and nothing
# else; keys and values are beside that, in a budget of their own, and pass through windows. The
# mixture's weights take 13.3 MiB, of which 4.8 MiB are in memory at a time: embedding and head, a
# ring for the layers' attention, and slots for a few of the 24 experts. Its two groups have
# embedding, head and ring once for both.
OFFLOADED = """
cluster: {{name: {name}}}
dashboard: {{port: {dashboard}}}
gateway: {{grpc_port: {grpc}, http_port: {http}}}
models:
  - name: demo-dense
    path: {model}
    engine: offload
    dtype: float32
    offload:
      device_memory: 9016KiB
      host_memory: 512KiB
      kv_home: streamed
      micro_batch: 24
      disk_path: packed
      ring_slots: 2
      resident: 0
    kv_cache: {{memory: 512KiB}}
    limits: {{max_context: 128, max_step_tokens: 64, max_running_requests: 4}}
  - name: resident
    path: {model}
    dtype: float32
    kv_cache: {{memory: 512KiB}}
    limits: {{max_context: 24}}
    overflow: {{to: demo-dense}}
  - name: foreign
    path: FOREIGN
    engine: offload
    offload: {{provider: auto}}
    kv_cache: {{memory: 1MiB}}
    limits: {{max_context: 128, max_step_tokens: 64, max_running_requests: 4}}
  - name: mixture
    path: MIXTURE
    engine: offload
    dtype: float32
    offload: {{device_memory: 7680KiB, disk_path: packed-mixture, ring_slots: 2}}
    kv_cache: {{memory: 512KiB}}
    limits: {{max_context: 128, max_step_tokens: 32, max_running_requests: 4}}
  - name: groups
    path: MIXTURE
    engine: offload
    dtype: float32
    parallel: {{dp: 2}}
    offload: {{device_memory: 6400KiB, disk_path: packed-groups}}
    kv_cache: {{memory: 512KiB}}
    limits: {{max_context: 128, max_step_tokens: 32, max_running_requests: 4}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    write_foreign_demo(folder / "foreign")
    template = OFFLOADED.replace("FOREIGN", str(folder / "foreign"))
    template = template.replace("MIXTURE", str(MIXTURE))
    running = start_cluster(folder, "offload", MODEL, template)
    yield running
    assert stop_cluster(running) == 0


def write_foreign_demo(folder) -> None:
    """A random Phi with the demo model's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = write_foreign("phi", folder, vocab_size=len(tokenizer))
    assert model.config.vocab_size == len(tokenizer)
    tokenizer.save_pretrained(folder)


def test_answers_of_a_streamed_model_equal_transformers(cluster):
    answers = transformers_answers(MODEL)
    check_tokens_over_grpc(cluster.grpc, "demo-dense", answers)
    check_texts_over_http(cluster.http, "demo-dense", answers)


@pytest.mark.parametrize("name", ["mixture", "groups"])
def test_answers_of_a_streamed_mixture_equal_transformers(cluster, name):
    """By one rank; and by two groups that read the weights together."""
    answers = transformers_answers(MIXTURE)
    check_tokens_over_grpc(cluster.grpc, name, answers)
    check_texts_over_http(cluster.http, name, answers)


def test_a_model_that_transformers_computes_answers_as_transformers_does(cluster):
    answers = transformers_answers(cluster.log.parent / "foreign")
    check_tokens_over_grpc(cluster.grpc, "foreign", answers)
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(
            model="foreign", prompt=PROMPTS[0], max_tokens=8, seed=3, logprobs=2
        )
        again = client.completions.create(
            model="foreign", prompt=PROMPTS[0], max_tokens=8, seed=3, logprobs=2
        )
        assert answer.choices[0].text == again.choices[0].text
        assert len(answer.choices[0].logprobs.tokens) == answer.usage.completion_tokens
        stop = answers[PROMPTS[0]][1][3:6]
        stopped = client.completions.create(
            model="foreign", prompt=PROMPTS[0], temperature=0, max_tokens=NUM_TOKENS, stop=[stop]
        )
        assert stopped.choices[0].finish_reason == "stop"
        assert stop not in stopped.choices[0].text
        with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
            client.embeddings.create(model="foreign", input="a")


def test_the_stores_are_where_the_file_says_and_status_knows_the_replicas(cluster):
    for store, num_ranks in (("packed", 1), ("packed-mixture", 1), ("packed-groups", 2)):
        assert len(list((cluster.log.parent / store).glob("*-1of1.weights"))) == num_ranks
    models = {replica["model"] for replica in cluster.replicas()}
    assert models == {"demo-dense", "resident", "foreign", "mixture", "groups"}
    assert penstock("status", env=cluster.env).returncode == 0


def test_what_is_too_long_for_the_resident_replica_runs_on_the_streamed_one(cluster):
    """And answers there as it does when it is asked for by name."""
    prompt = "def name(self):\n    return self.name\n\n\n" * 3
    sampling = pb.SamplingOptions(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    tokens, headers = {}, {}
    with grpc.insecure_channel(cluster.grpc) as channel:
        stub = pb_grpc.PenstockStub(channel)
        for name, text in (("resident", prompt), ("demo-dense", prompt), ("short", "a")):
            model = "resident" if name == "short" else name
            call = stub.Generate(
                pb.GenerateRequest(model=model, text=text, sampling=sampling), timeout=60
            )
            headers[name] = dict(call.initial_metadata())
            tokens[name] = [token for piece in call for token in piece.token_ids]
    assert tokens["resident"] == tokens["demo-dense"]
    assert headers["resident"]["penstock-overflow"] == "too_long"
    assert headers["resident"]["penstock-served-by"] == "demo-dense"
    assert headers["resident"]["penstock-engine"] == "offload"
    assert float(headers["resident"]["penstock-predicted-tokens-per-s"]) > 0
    assert headers["short"]["penstock-engine"] == "tensor_parallel"
    assert "penstock-overflow" not in headers["short"]
    with openai.OpenAI(base_url=f"{cluster.http}/v1", api_key="none", max_retries=0) as client:
        for stream in (False, True):
            answer = client.completions.with_raw_response.create(
                model="resident", prompt=prompt, temperature=0, max_tokens=4, stream=stream
            )
            assert answer.headers["x-penstock-overflow"] == "too_long"
            assert answer.headers["x-penstock-served-by"] == "demo-dense"
            answer.parse().close() if stream else answer.parse()


def test_copied_text_is_drafted_and_counted(cluster):
    sampling = pb.SamplingOptions(temperature=0, max_tokens=48, ignore_eos=True)
    with grpc.insecure_channel(cluster.grpc) as channel:
        request = pb.GenerateRequest(model="demo-dense", text="import os\n" * 8, sampling=sampling)
        for _ in pb_grpc.PenstockStub(channel).Generate(request, timeout=60):
            pass
    (streamed,) = cluster.replicas("demo-dense")
    assert 0 < int(streamed["accepted_draft_tokens"]) <= int(streamed["draft_tokens"])
