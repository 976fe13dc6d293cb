"""A model that knows nothing of tools still makes calls that fit: ranks keep to the grammar."""

import json
import shutil

import openai
import pytest

from tests.e2e.conftest import CLUSTER, MODEL, start_cluster, stop_cluster

pytestmark = pytest.mark.e2e

TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{{ messages[-1].content }}<tool_call>"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Ulm", "Bonn"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "next": {"$ref": "#/$defs/flag"},
    },
    "required": ["city", "days", "next"],
    "additionalProperties": False,
    "$defs": {"flag": {"type": "boolean"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object",
     "properties": {}, "additionalProperties": False}}},
]  # fmt: skip
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    model = folder / MODEL.name
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    running = start_cluster(folder, "tools", model, CLUSTER.replace("replicas: 2", "replicas: 1"))
    try:
        with openai.OpenAI(base_url=f"{running.http}/v1", api_key="unused") as client:
            yield client
    finally:
        stop_cluster(running)


def ask(client, **fields):
    messages = [{"role": "user", "content": "def f():"}]
    return client.chat.completions.create(
        model=MODEL.name, messages=messages, tools=TOOLS, max_tokens=200, **fields
    )


def check(call):
    arguments = json.loads(call["arguments"])
    if call["name"] == "now":
        assert arguments == {}
        return
    assert call["name"] == "weather"
    assert arguments["city"] in ("Ulm", "Bonn")
    assert 1 <= arguments["days"] <= 9
    assert isinstance(arguments["next"], bool)


@pytest.mark.parametrize("seed", range(4))
def test_calls_that_have_to_be_made_fit_their_schemas(client, seed):
    common = {"temperature": 1.0, "seed": seed}
    (choice,) = ask(client, tool_choice="required", parallel_tool_calls=False, **common).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    check({"name": call.function.name, "arguments": call.function.arguments})
    (choice,) = ask(client, tool_choice=NAMED, **common).choices
    assert (choice.finish_reason, choice.message.content) == ("stop", None)
    (call,) = choice.message.tool_calls
    check({"name": call.function.name, "arguments": call.function.arguments})
    parts = [
        chunk.choices[0].delta.tool_calls[0].function
        for chunk in ask(client, tool_choice=NAMED, stream=True, **common)
        if chunk.choices and chunk.choices[0].delta.tool_calls
    ]
    assert parts[0].name == "weather"
    assert "".join(part.arguments for part in parts) == call.function.arguments


def test_a_free_model_is_heard_as_it_writes(client):
    (choice,) = ask(client, temperature=0).choices
    assert choice.message.tool_calls is None
    assert choice.message.content
