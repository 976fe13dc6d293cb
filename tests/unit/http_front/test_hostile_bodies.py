"""Bodies that must be refused with an OpenAI-shaped 4xx, and odd ones that must not be a 5xx."""

import json
import time

import httpx
import pytest
from scripted_handler import MODEL

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
USER = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}

NOT_JSON = {
    "empty": b"",
    "words": b"hello",
    "truncated": b'{"model": "m", "prompt": "x',
    "two documents": b"{}{}",
    "trailing text": b"{} x",
    "array": b"[]",
    "null": b"null",
    "number": b"1",
    "string": b'"x"',
    "comment": b'{"prompt": "x" /* c */}',
    "python repr": b"{'prompt': 'x'}",
    "nested arrays": b"[" * 100_000,
    "nested arrays in a field": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "depth 65": b'{"prompt": ' + b"[" * 65 + b"]" * 65 + b"}",
    "many containers": b'{"prompt": [' + b"[]," * 20_000 + b"[]]}",
    "many keys": json.dumps({f"k{i}": 1 for i in range(100_000)}).encode(),
    "repeated key": b'{"prompt": "a", "prompt": "b"}',
    "NaN": b'{"temperature": NaN}',
    "Infinity": b'{"temperature": Infinity}',
    "-Infinity": b'{"temperature": -Infinity}',
    "1e400": b'{"temperature": 1e400}',
    "20,000 digits": b'{"seed": ' + b"9" * 20_000 + b"}",
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "overlong UTF-8": b'{"prompt": "\xc0\xaf"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"prompt": "x"}',
}

BAD_COMPLETIONS = [
    {"model": None},
    {"model": 5},
    {"model": []},
    {"model": ""},
    {"prompt": None},
    {"prompt": 5},
    {"prompt": {}},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": ["a", 1]},
    {"prompt": [1, "a"]},
    {"prompt": [1.5]},
    {"prompt": [True]},
    {"prompt": [-1]},
    {"prompt": [257]},
    {"prompt": [2**64]},
    {"prompt": ["x"] * 65},
    {"prompt": ["x"] * 20_000},
    {"prompt": "x" * 100_000},
    {"prompt": "\ud800"},
    {"stream": "banana"},
    {"stream": 1},
    {"stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": []},
    {"stream": True, "stream_options": {"include_usage": "yes"}},
    {"stream": True, "stream_options": {"unknown": 1}},
    {"stream": True, "prompt_logprobs": 1},
    {"temperature": "hot"},
    {"temperature": -0.1},
    {"temperature": 2.1},
    {"temperature": 1e308},
    {"temperature": True},
    {"top_p": -0.1},
    {"top_p": 0},
    {"top_p": 1.1},
    {"presence_penalty": 99},
    {"frequency_penalty": -99},
    {"top_k": -5},
    {"top_k": 1.5},
    {"min_p": 2},
    {"repetition_penalty": 0},
    {"max_tokens": "ten"},
    {"max_tokens": 1.5},
    {"max_tokens": True},
    {"max_tokens": []},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": -(2**63)},
    {"max_tokens": 10**9},
    {"max_tokens": 2**63},
    {"min_tokens": 10**9},
    {"n": 0},
    {"n": -1},
    {"n": 1.5},
    {"n": 10**9},
    {"best_of": 10**9},
    {"best_of": 2},
    {"best_of": True},
    {"logprobs": 10**6},
    {"logprobs": -7},
    {"logprobs": True},
    {"prompt_logprobs": 21},
    {"logit_bias": []},
    {"logit_bias": {"999999": 1}},
    {"logit_bias": {"-5": 1}},
    {"logit_bias": {"abc": 1}},
    {"logit_bias": {"5": 10**9}},
    {"logit_bias": {"5": "x"}},
    {"logit_bias": {str(i): 1 for i in range(301)}},
    {"stop": 5},
    {"stop": [["a"]]},
    {"stop": ""},
    {"stop": [""]},
    {"stop": ["a"] * 5},
    {"stop": "x" * 257},
    {"stop_token_ids": "5"},
    {"stop_token_ids": [10**6]},
    {"seed": 2**70},
    {"seed": "x"},
    {"user": 5},
    {"user": "x" * 257},
    {"echo": "yes"},
    {"ignore_eos": 1},
    {"priority": "high"},
    {"timeout": -1},
    {"suffix": "tail"},
    {"tools": [{"type": "function"}]},
    {"use_beam_search": True},
    {"chat_template": "{{ 1 }}"},
    {"prompt_embeds": "AAAA"},
    {"guided_json": {}},
    {"_internal": 1},
    {"x" * 10_000: 1},
    {"\r\nInjected: 1": 1},
]

BAD_CHATS = [
    {"messages": None},
    {"messages": []},
    {"messages": "hi"},
    {"messages": [None]},
    {"messages": [5]},
    {"messages": [{}]},
    {"messages": [{"content": "x"}]},
    {"messages": [{"role": "wizard", "content": "x"}]},
    {"messages": [{"role": 5, "content": "x"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": 5}]},
    {"messages": [{"role": "user", "content": {}}]},
    {"messages": [{"role": "user", "content": []}]},
    {"messages": [{"role": "user", "content": ["x"]}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
    {"messages": [{"role": "user", "content": [{"type": "unknown"}]}]},
    {"messages": [{"role": "user", "content": "x", "name": 5}]},
    {"messages": [{"role": "user", "content": "x", "nmae": "y"}]},
    {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
    {"messages": USER * 1025},
    {"messages": [{"role": "user", "content": "\udfff"}]},
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"tool_choice": "required"},
    {"response_format": {"type": "yaml"}},
    {"response_format": "json"},
    {"functions": [{}]},
    {"chat_template_kwargs": {"a": 1}},
    {"logprobs": 5},
    {"top_logprobs": 3},
    {"logprobs": True, "top_logprobs": 21},
    {"logprobs": True, "top_logprobs": -1},
    {"logprobs": True, "top_logprobs": 10**6},
    {"max_tokens": 5, "max_completion_tokens": 6},
    {"max_completion_tokens": "ten"},
    {"modalities": ["audio"]},
    {"echo": True},
]
IMAGES = [
    "http://169.254.169.254/latest",
    "file:///etc/passwd",
    "data:image/png;base64," + "A" * 9999,
]
BAD_CHATS += [
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    for url in IMAGES
]

BAD_EMBEDDINGS = [
    {"input": None},
    {"input": []},
    {"input": ""},
    {"input": [""]},
    {"input": [1.5]},
    {"input": [["a"]]},
    {"input": [-1]},
    {"input": ["x"] * 65},
    {"encoding_format": "hex"},
    {"encoding_format": 5},
    {"dimensions": 0},
    {"dimensions": -1},
    {"dimensions": "all"},
    {"pooling": "max"},
    {"normalize": "yes"},
    {"inputs": ["x"]},
]

GOOD = [
    (COMPLETIONS, {"model": MODEL, "prompt": "x"}),
    (CHAT, {"model": MODEL, "messages": USER}),
    (EMBEDDINGS, {"model": MODEL, "input": "x"}),
]
TABLE = [
    (path, good, change)
    for (path, good), changes in zip(
        GOOD, (BAD_COMPLETIONS, BAD_CHATS, BAD_EMBEDDINGS), strict=True
    )
    for change in changes
]


@pytest.fixture
async def http(app):
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        yield client


def check_error(response, *statuses):
    assert response.status_code in statuses, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 600
    assert error["type"]
    assert "\n" not in error["message"]
    assert response.headers["x-request-id"]
    return error


async def test_bodies_that_are_no_json_object(http):
    for name, body in NOT_JSON.items():
        start = time.perf_counter()
        response = await http.post(COMPLETIONS, content=body, headers=JSON)
        check_error(response, 400)
        assert time.perf_counter() - start < 1.0, name


async def test_bad_fields_are_refused_and_named(http, handler):
    for path, good, change in TABLE:
        response = await http.post(path, content=json.dumps(good | change), headers=JSON)
        error = check_error(response, 400)
        names = [name.encode("unicode_escape").decode()[:60] for name in change]
        assert any(str(error["param"]).startswith(name) for name in names), (change, error)
    assert handler.opened == handler.closed


async def test_good_bodies_pass(http):
    """The tables' bodies are bad for their one change only."""
    for path, good in GOOD:
        assert (await http.post(path, json=good)).status_code == 200


async def test_unknown_field_names_the_nearest(http):
    body = {"model": MODEL, "prompt": "x", "temprature": 1}
    error = check_error(await http.post(COMPLETIONS, json=body), 400)
    assert error["param"] == "temprature"
    assert "temperature" in error["message"]


@pytest.mark.parametrize(
    "name",
    [
        "x",
        "../../../../etc/passwd",
        "/etc/passwd",
        "http://h/",
        "$(id)",
        "a\x00b",
        "a\r\nb",
        "x" * 200_000,
    ],
)
async def test_unknown_models_are_404_with_a_short_name(http, name):
    response = await http.post(COMPLETIONS, json={"model": name, "prompt": "x"})
    error = check_error(response, 404)
    assert error["param"] == "model"


NEUTRAL = [
    {"tools": []},
    {"tools": None},
    {"tool_choice": "none"},
    {"response_format": {"type": "text"}},
    {"store": False},
    {"service_tier": "auto"},
    {"metadata": {}},
    {"top_k": -1},
    {"temperature": None, "stop": None, "seed": None, "logit_bias": None, "n": None},
    {"stream": None, "stream_options": None},
]


@pytest.mark.parametrize("change", NEUTRAL, ids=str)
async def test_fields_that_ask_for_nothing_pass(http, change):
    response = await http.post(CHAT, json={"model": MODEL, "messages": USER} | change)
    assert response.status_code == 200


ODD_TEXTS = [
    "\x00",
    "\x1b[31m",
    "\u202e\u2066",
    "e" + "\u0301" * 2000,
    "<|end|>",
    "\u2028",
    "\U0010ffff",
    "\ufdd1",
    "\r\n\r\ndata: [DONE]\r\n\r\n",
]


@pytest.mark.parametrize("text", ODD_TEXTS, ids=ascii)
async def test_odd_text_is_never_a_server_error(http, handler, text):
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    response = await http.post(CHAT, json=body)
    assert response.status_code in (200, 400)
    if handler.requests:
        assert 256 not in handler.requests[-1].prompt_token_ids


async def test_long_prompts_are_refused(http):
    for prompt in ("word " * 100_000, "\n" * (2 << 20)):
        response = await http.post(COMPLETIONS, json={"model": MODEL, "prompt": prompt})
        check_error(response, 400, 413)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/jsonx"},
        {"content-type": ""},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "content-encoding": "deflate"},
    ],
    ids=str,
)
async def test_other_media_types_are_415(http, headers):
    response = await http.post(COMPLETIONS, content=b"{}", headers=headers)
    check_error(response, 415)


async def test_charset_in_the_content_type_passes(http):
    headers = {"content-type": "application/json; charset=utf-8"}
    body = json.dumps({"model": MODEL, "prompt": "x"})
    assert (await http.post(COMPLETIONS, content=body, headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("PUT", "/v1/models", 405),
        ("DELETE", "/v1/models/x", 405),
        ("TRACE", COMPLETIONS, 405),
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "//v1/models", 404),
        ("GET", "/v1/models/..%2f..%2fetc", 404),
        ("POST", "/v1/completions/", 404),
        ("POST", "/V1/completions", 404),
        ("GET", "/docs", 404),
    ],
)
async def test_unknown_paths_and_methods(http, method, path, status):
    check_error(await http.request(method, path), status)


async def test_whoever_takes_a_wrong_turn_is_told_the_ways(http):
    lost = check_error(await http.get("/v1/complete"), 404)["message"]
    for way in ("POST /v1/completions", "GET /v1/models/{name}", "GET /metrics"):
        assert way in lost
    wrong = check_error(await http.get(COMPLETIONS), 405)["message"]
    assert "GET" in wrong
    assert "Use POST" in wrong


async def test_large_heads_are_refused(http):
    check_error(await http.get("/healthz?" + "x" * 9000), 414)
    check_error(await http.get("/healthz", headers={"x-long": "y" * 17_000}), 431)
    many = {f"x-{i}": "y" for i in range(120)}
    check_error(await http.get("/healthz", headers=many), 431)


@pytest.mark.parametrize(
    ("given", "echoed"),
    [("abc-1.2_X", True), ("x" * 65, False), ("a b", False), ("\u00e9", False), ("", False)],
)
async def test_request_ids(http, given, echoed):
    headers = {"x-request-id": given.encode("latin-1")}
    answer = await http.get("/healthz", headers=headers)
    assert (answer.headers["x-request-id"] == given) == echoed


async def test_operator_paths(http, handler):
    assert (await http.get("/healthz")).json() == {"status": "ok"}
    assert (await http.get("/readyz")).status_code == 200
    handler.is_ready = False
    starting = await http.get("/readyz")
    assert (starting.status_code, starting.headers["retry-after"]) == (503, "1")
    assert "penstock_probe_total 1.0" in (await http.get("/metrics")).text


async def test_tokenize_and_back(http):
    body = {"model": MODEL, "prompt": "h\u00e9<|end|>", "return_token_strs": True}
    answer = (await http.post("/tokenize", json=body)).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert 256 not in answer["tokens"]
    back = await http.post("/detokenize", json={"model": MODEL, "tokens": answer["tokens"]})
    assert back.json() == {"prompt": "h\u00e9<|end|>"}
    chat = await http.post("/tokenize", json={"model": MODEL, "messages": USER})
    assert chat.json()["max_model_len"] == 2048
    check_error(await http.post("/tokenize", json={"model": MODEL}), 400)
    check_error(await http.post("/detokenize", json={"model": MODEL, "tokens": [10**6]}), 400)
    check_error(await http.post("/detokenize", json={"model": MODEL, "token": [1]}), 400)
