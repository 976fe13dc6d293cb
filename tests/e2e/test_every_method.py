"""Every unary method as a client meets it that has nothing but an address: through reflection.

The oracle is `transformers` on the same checkpoint in fp32.
"""

import grpc
import pytest
import torch
import transformers
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.e2e.conftest import MODEL

pytestmark = pytest.mark.e2e

TEXT = "def main():\n    return 1"


@pytest.fixture(scope="module")
def ask(cluster):
    """Calls a method with a message as JSON has it, and gives the answer as JSON has it."""
    with grpc.insecure_channel(cluster.grpc) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        service = pool.FindServiceByName("penstock.v1.Penstock")

        def ask(name: str, **fields) -> dict:
            method = service.FindMethodByName(name)
            call = channel.unary_unary(
                f"/{service.full_name}/{name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )
            message = json_format.ParseDict(fields, GetMessageClass(method.input_type)())
            answer = call(message, timeout=60)
            return json_format.MessageToDict(answer, preserving_proto_field_name=True)

        yield ask


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def test_models_are_listed_with_their_replicas(ask):
    (model,) = ask("ListModels")["models"]
    assert (model["name"], model["family"], model["engine"]) == (
        "demo-dense",
        "llama",
        "tensor_parallel",
    )
    assert model["replicas"] == model["ready_replicas"] == 2
    assert model["chat"] is True


def test_text_becomes_tokens_and_tokens_text(ask, tokenizer):
    tokens = ask("Tokenize", model="demo-dense", text=TEXT)
    assert tokens["token_ids"] == tokenizer(TEXT)["input_ids"]
    assert "".join(tokens["tokens"]) == TEXT
    ids = tokens["token_ids"]
    assert ask("Detokenize", model="demo-dense", token_ids=ids) == {"text": TEXT}
    turns = [{"role": "user", "content": "Sort a list."}]
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ask("Tokenize", model="demo-dense", messages=turns)["token_ids"] == wanted


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_pooled_hidden_states_of_transformers(ask, tokenizer, pooling):
    ids = tokenizer(TEXT)["input_ids"]
    model = transformers.AutoModel.from_pretrained(MODEL, dtype=torch.float32)
    with torch.no_grad():
        hidden = model(torch.tensor([ids])).last_hidden_state[0]
    pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
    inputs = [{"text": TEXT}, {"token_ids": {"ids": ids}}]
    answer = ask("Embed", model="demo-dense", inputs=inputs, pooling=pooling)
    expected = pooled / pooled.norm()
    for vector in answer["embeddings"]:
        values = torch.tensor(vector["values"])
        torch.testing.assert_close(values, expected, atol=2e-4, rtol=1e-3)
    assert answer["usage"] == {"prompt_tokens": 2 * len(ids)}


def test_continuations_are_scored_each_on_its_own(ask):
    answer = ask(
        "Score",
        model="demo-dense",
        text="import ",
        continuations=[{"text": "os\n"}, {"text": "zzqq"}, {"text": "os\n"}],
    )
    likely, unlikely, again = (score["total_logprob"] for score in answer["scores"])
    assert unlikely < likely < 0
    assert again == pytest.approx(likely, rel=1e-5)


def test_a_request_that_does_not_run_is_not_cancelled_and_status_tells_of_all(ask):
    assert ask("Cancel", request_id="nobody") == {}
    status = ask("Status")
    assert status["cluster"] == "e2e"
    assert {replica["state"] for replica in status["replicas"]} == {"ready"}
    assert all(len(replica["workers"]) == 2 for replica in status["replicas"])


def test_what_is_wrong_is_said_with_a_code(ask):
    with pytest.raises(grpc.RpcError) as refused:
        ask("Embed", model="demo-dens", inputs=[{"text": "x"}])
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert "demo-dense" in refused.value.details()
    assert dict(refused.value.trailing_metadata())["penstock-error-code"] == "unknown_model"
