"""A mixture in memory for about a third of its weights, through gateway, gRPC and HTTP."""

import pytest

from tests.e2e.conftest import MIXTURE, start_cluster, stop_cluster
from tests.support.greedy_answers import (
    check_texts_over_http,
    check_tokens_over_grpc,
    transformers_answers,
)

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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed-moe")
    running = start_cluster(folder, "streamed-moe", MIXTURE, STREAMED)
    yield running
    assert stop_cluster(running) == 0


@pytest.fixture(scope="module")
def answers():
    """Tokens and text of each prompt by transformers."""
    return transformers_answers(MIXTURE)


def test_tokens_over_grpc_equal_transformers(cluster, answers):
    check_tokens_over_grpc(cluster.grpc, "demo-moe", answers)


def test_texts_over_http_equal_transformers(cluster, answers):
    check_texts_over_http(cluster.http, "demo-moe", answers)


def test_the_plan_says_that_it_streams_from_one_store(cluster):
    (replica,) = cluster.replicas()
    assert replica["model"] == "demo-moe"
    assert len(list((cluster.log.parent / "packed").glob("*-1of1.weights"))) == 1
