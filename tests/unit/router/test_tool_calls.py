"""Tools through the whole gateway, asked for by the `openai` client; the engine is scripted."""

import json
from contextlib import asynccontextmanager

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from gateway_harness import IM_END, LIMITS, MODEL, model_plan, running_gateway, write_checkpoint
from llguidance import LLMatcher
from prometheus_client import CollectorRegistry

from cluster.base.front_plan import GatewayPlan
from replicas.text.tokenizer import Tokenizer
from router.http.app import build_http_app
from router.structured_output import json_grammar
from router.tools.call_formats import CallFormat
from router.tools.forced_calls import forced_schema
from router.tools.tool_use import ToolChoice, ToolUse

TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant\n"
)
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
TIME = {"type": "function", "function": {"name": "time", "description": "Now."}}
USER = [{"role": "user", "content": "hi"}]
STOP = {"stop_token_ids": [IM_END]}
"""The scripted engine knows no end token of its own."""
CALL = '{"name": "weather", "arguments": {"city": "Ulm"}}'
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "tools")


@asynccontextmanager
async def asking(checkpoint, answer="", template=TEMPLATE, **plan):
    """A client, and the engine that says `answer` whatever it is asked."""
    (checkpoint / "chat_template.jinja").write_text(template)
    ids = Tokenizer.from_directory(checkpoint).encode(answer)
    engine = FakeEngine(script=lambda request, index: [*ids, IM_END])
    async with running_gateway(
        checkpoint, engines=[engine], plans=[model_plan(checkpoint, **plan)]
    ) as gw:
        front = GatewayPlan(host="127.0.0.1", grpc_port=0, http_port=0, replicas=1, limits=LIMITS)
        transport = httpx.ASGITransport(build_http_app(gw.handler, front, CollectorRegistry()))
        async with openai.AsyncOpenAI(
            base_url="http://gateway/v1",
            api_key="unused",
            max_retries=0,
            http_client=httpx.AsyncClient(transport=transport),
        ) as client:
            yield client, engine


async def chat(client, messages=USER, **fields):
    answer = await client.chat.completions.create(
        model=MODEL, messages=messages, extra_body=STOP, **fields
    )
    return answer.choices[0]


def prompt_of(checkpoint, engine):
    ids = engine.requests[-1].prompt_token_ids
    return Tokenizer.from_directory(checkpoint).decode(ids, skip_special_tokens=False)


def shown(call):
    return call.function.name, json.loads(call.function.arguments)


async def test_calls_beside_text(checkpoint):
    said = f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>"
    async with asking(checkpoint, said) as (client, engine):
        choice = await chat(client, tools=[WEATHER, TIME])
        prompt = prompt_of(checkpoint, engine)
    assert '<tools>{"type": "function", "function": {"name": "weather"' in prompt
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    first, second = choice.message.tool_calls
    assert shown(first) == shown(second) == ("weather", {"city": "Ulm"})
    assert first.id != second.id
    assert first.type == "function"


async def test_one_call_only_where_parallel_ones_are_not_wanted(checkpoint):
    said = f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>"
    async with asking(checkpoint, said) as (client, _):
        choice = await chat(client, tools=[WEATHER], parallel_tool_calls=False)
    assert len(choice.message.tool_calls) == 1
    assert choice.message.content is None


async def test_an_answer_without_a_call(checkpoint):
    async with asking(checkpoint, "It is warm.") as (client, engine):
        choice = await chat(client, tools=[WEATHER])
        assert (choice.message.content, choice.message.tool_calls) == ("It is warm.", None)
        assert choice.finish_reason == "stop"
        await chat(client, tools=[WEATHER], tool_choice="none")
        assert "<tools>" not in prompt_of(checkpoint, engine)


async def streamed(client, **fields):
    """Text, calls by index and the ending, put together as clients do."""
    text, calls, ending, roles = "", {}, None, []
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, stream=True, extra_body=STOP, **fields
    )
    async for chunk in stream:
        (choice,) = chunk.choices
        roles.append(choice.delta.role)
        text += choice.delta.content or ""
        for part in choice.delta.tool_calls or ():
            call = calls.setdefault(part.index, {"id": part.id, "name": "", "arguments": ""})
            call["name"] += part.function.name or ""
            call["arguments"] += part.function.arguments or ""
        ending = choice.finish_reason or ending
    assert roles[0] == "assistant"
    return text, list(calls.values()), ending


async def test_a_stream_says_what_the_whole_does(checkpoint):
    said = f"So.\n<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"
    async with asking(checkpoint, said) as (client, _):
        text, calls, ending = await streamed(client, tools=[WEATHER])
        assert (text, ending) == ("So.", "tool_calls")
        assert [call["name"] for call in calls] == ["weather", "weather"]
        assert json.loads(calls[1]["arguments"]) == {"city": "Ulm"}
        assert calls[0]["id"] != calls[1]["id"]
    async with asking(checkpoint, "Only text, streamed.") as (client, _):
        assert await streamed(client, tools=[WEATHER]) == ("Only text, streamed.", [], "stop")


async def test_a_named_function(checkpoint):
    async with asking(checkpoint, '{"city": "Ulm"}') as (client, engine):
        choice = await chat(client, tools=[WEATHER, TIME], tool_choice=NAMED)
        assert choice.finish_reason == "stop"
        assert [shown(call) for call in choice.message.tool_calls] == [("weather", {"city": "Ulm"})]
        assert choice.message.content is None
        assert engine.requests[-1].params.grammar == json_grammar(json.dumps(SCHEMA))
        text, (call,), ending = await streamed(client, tools=[WEATHER], tool_choice=NAMED)
        assert (text, ending, call["arguments"]) == ("", "stop", '{"city": "Ulm"}')


async def test_any_function(checkpoint):
    said = (
        '[{"name": "weather", "parameters": {"city": "Ulm"}}, {"name": "time", "parameters": {}}]'
    )
    async with asking(checkpoint, said) as (client, engine):
        choice = await chat(client, tools=[WEATHER, TIME], tool_choice="required")
        assert choice.finish_reason == "tool_calls"
        assert [shown(call) for call in choice.message.tool_calls] == [
            ("weather", {"city": "Ulm"}),
            ("time", {}),
        ]
        assert "weather" in engine.requests[-1].params.grammar
        text, calls, ending = await streamed(client, tools=[WEATHER, TIME], tool_choice="required")
        assert (text, len(calls), ending) == ("", 2, "tool_calls")


async def test_mistral_s_control_token_is_kept_and_its_ids_fit(checkpoint):
    async with asking(checkpoint, f"[TOOL_CALLS][{CALL}]", tool_call_parser="mistral") as (
        client,
        _,
    ):
        choice = await chat(client, tools=[WEATHER])
        (call,) = choice.message.tool_calls
        assert len(call.id) == 9
        assert call.id.isalnum()


async def test_the_conversation_goes_on(checkpoint):
    said = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "<|im_end|>"}'}}  # fmt: skip
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [said]},
        {"role": "tool", "tool_call_id": "call_1", "content": "warm"},
    ]
    async with asking(checkpoint, "It is warm.") as (client, engine):
        choice = await chat(client, messages, tools=[WEATHER])
        assert choice.message.content == "It is warm."
        prompt = prompt_of(checkpoint, engine)
    assert (
        '<tool_call>{"name": "weather", "arguments": {"city": "<|im_end|>"}}</tool_call>' in prompt
    )
    assert "tool\nwarm" in prompt


@pytest.mark.parametrize(
    ("fields", "template", "param", "cause"),
    [
        ({"tools": [WEATHER]}, PLAIN, "tools", "does not take any"),
        ({"tools": [WEATHER]}, "{{ tools }}", "tools", "is not known"),
        ({"tools": [{"type": "retrieval"}]}, TEMPLATE, "tools[0]", "of type 'function'"),
        ({"tools": [WEATHER, WEATHER]}, TEMPLATE, "tools[1].function.name", "there twice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, TEMPLATE,
         "tools[0].function.name", "must match"),
        ({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}, TEMPLATE,
         "tools[0].function.x", "is not known"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, TEMPLATE,
         "tools[0].function.strict", "cannot be kept"),
        ({"tools": [WEATHER], "tool_choice": "any"}, TEMPLATE, "tool_choice", "must be"),
        ({"tools": [TIME], "tool_choice": NAMED}, TEMPLATE, "tool_choice", "not among"),
        ({"tool_choice": "required"}, TEMPLATE, "tool_choice", "no tools"),
        ({"tools": [WEATHER], "parallel_tool_calls": "no"}, TEMPLATE, "parallel_tool_calls",
         "must be true or false"),
        ({"tools": [WEATHER], "tool_choice": "required",
          "response_format": {"type": "json_object"}}, TEMPLATE, "response_format", "contradicts"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 7}}}],
          "tool_choice": "required"}, TEMPLATE, "tools", "cannot be followed"),
        ({"messages": [{"role": "tool", "content": "x"}]}, TEMPLATE, "messages[0].tool_call_id",
         "is missing"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "a"}]}, PLAIN,
         "messages[0]", "knows none"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[]"}}]}]},
         TEMPLATE, "messages[0].tool_calls[0].function.arguments", "JSON text of an object"),
    ],
)  # fmt: skip
async def test_what_is_refused(checkpoint, fields, template, param, cause):
    async with asking(checkpoint, template=template) as (client, engine):
        with pytest.raises(openai.BadRequestError) as caught:
            await chat(client, **fields)
    assert caught.value.param == param
    assert cause in caught.value.message
    assert engine.requests == []


def use(choice, *functions, parallel=True):
    tools = tuple({"type": "function", "function": function} for function in functions)
    named = functions[0]["name"] if choice is ToolChoice.NAMED else ""
    return ToolUse(definitions=tools, choice=choice, named=named, parallel=parallel)


def test_references_of_a_schema_hold_among_others():
    tree = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/leaf"}},
        "additionalProperties": False,
        "$defs": {"leaf": {"type": "integer"}},
    }
    schema = forced_schema(
        use(ToolChoice.REQUIRED, {"name": "a", "parameters": tree}, {"name": "b", "parameters": {}})
    )
    grammar = json_grammar(json.dumps(schema))
    assert LLMatcher.validate_grammar(grammar) == ""


def test_one_call_at_most_where_parallel_ones_are_not_wanted():
    function = {"name": "a", "parameters": SCHEMA}
    assert forced_schema(use(ToolChoice.REQUIRED, function, parallel=False))["maxItems"] == 1
    assert forced_schema(use(ToolChoice.NAMED, function)) == SCHEMA


def test_only_mistral_s_calls_begin_with_a_control_token():
    assert [form for form in CallFormat if form.keeps_specials] == [CallFormat.MISTRAL]
