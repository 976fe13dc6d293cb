"""`response_format` and `structured_outputs` become a grammar, or are refused by name."""

import json

import httpx
import pytest
from llguidance import LLMatcher
from openai import AsyncOpenAI
from pydantic import BaseModel
from scripted_handler import MODEL

from router.structured_output import json_grammar

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
async def http(base_url):
    async with httpx.AsyncClient(base_url=base_url) as client:
        yield client


def schema_format(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


ACCEPTED = [
    (
        {"response_format": schema_format(SCHEMA, strict=True)},
        json_grammar(json.dumps(SCHEMA)),
    ),
    (
        {"response_format": {"type": "json_object"}},
        json_grammar('{"type": "object"}'),
    ),
    ({"response_format": {"type": "text"}}, ""),
    ({"response_format": None, "structured_outputs": None}, ""),
    (
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        json_grammar(json.dumps(SCHEMA)),
    ),
    ({"structured_outputs": {"regex": "a+", "json": None}}, LLMatcher.grammar_from_regex("a+")),
    (
        {"structured_outputs": {"choice": ["yes", 'n"o', "ä\n"]}},
        LLMatcher.grammar_from_lark('start: "yes" | "n\\"o" | "ä\\n"'),
    ),
    (
        {"structured_outputs": {"grammar": 'start: "x"+'}},
        LLMatcher.grammar_from_lark('start: "x"+'),
    ),
]


@pytest.mark.parametrize(("fields", "grammar"), ACCEPTED, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_wish_becomes_a_grammar(http, handler, path, fields, grammar):
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    response = await http.post(path, json={"model": MODEL, **prompt, **fields})
    assert response.status_code == 200, response.text
    (request,) = handler.requests
    assert request.params.grammar == grammar


async def test_openais_client_sends_a_pydantic_model(base_url, handler):
    class Answer(BaseModel):
        name: str
        sizes: list[int]

    async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(ValueError, match="JSON"):  # the scripted handler's words are no JSON
            await client.chat.completions.parse(
                model=MODEL, messages=MESSAGES, response_format=Answer
            )
    (request,) = handler.requests
    assert "sizes" in request.params.grammar


REFUSED = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
     "response_format.json_schema.schema"),
    ({"response_format": schema_format(SCHEMA, stict=True)}, "response_format.json_schema.stict"),
    ({"response_format": schema_format({"type": "thing"})}, "response_format"),
    ({"response_format": schema_format({"type": "array", "uniqueItems": True})}, "response_format"),
    ({"response_format": schema_format({"$ref": "http://169.254.169.254/"})}, "response_format"),
    ({"response_format": schema_format({"description": "x" * 70_000})}, "response_format"),
    ({"response_format": schema_format({"title": "\ud800"})}, "response_format"),
    ({"structured_outputs": []}, "structured_outputs"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "(["}}, "structured_outputs"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"choice": [""]}}, "structured_outputs"),
    ({"structured_outputs": {"choice": ["a"] * 1025}}, "structured_outputs"),
    ({"structured_outputs": {"grammar": "nonsense"}}, "structured_outputs"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}},
     "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos"),
    ({"structured_outputs": {"regex": "a"}, "min_tokens": 2, "max_tokens": 5}, "min_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=lambda value: str(value)[:60])
async def test_what_cannot_be_followed_is_refused_by_the_clients_name(http, handler, fields, param):
    body = json.dumps({"model": MODEL, "messages": MESSAGES, **fields})
    response = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert error["code"] == "invalid_request"
    assert "structured_output " not in error["message"]
    assert error["message"].isprintable()
    assert len(error["message"]) < 400
    assert not handler.requests
