"""An unmodified `openai` client against the front on a loopback port."""

import asyncio

import openai
import pytest
from scripted_handler import MODEL, SCRIPT, until

from cluster.base.errors import (
    DeadlineExceededError,
    InternalError,
    OverloadedError,
    UnavailableError,
    WorkerDiedError,
)

TEXT = "".join(SCRIPT)
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def client(base_url):
    async with openai.AsyncOpenAI(
        base_url=f"{base_url}/v1", api_key="unused", max_retries=0, timeout=10
    ) as client:
        yield client


async def test_models(client):
    listed = await client.models.list()
    assert [model.id for model in listed.data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_completion(client):
    answer = await client.completions.create(model=MODEL, prompt="abc", max_tokens=50)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (TEXT, "stop")
    assert choice.stop_reason == "<|end|>"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, len(SCRIPT))
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.id.startswith("cmpl-")


async def test_completion_stream_equals_whole(client):
    stream = await client.completions.create(
        model=MODEL,
        prompt="abc",
        max_tokens=50,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    *parts, usage = chunks
    assert "".join(chunk.choices[0].text for chunk in parts) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in parts][-1] == "stop"
    assert all(chunk.usage is None for chunk in parts)
    assert usage.choices == []
    assert usage.usage.total_tokens == 3 + len(SCRIPT)
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["ab", "c"], 2),
        ([97, 98], 1),
        ([[97], [98, 99], [100]], 3),
    ],
)
@pytest.mark.parametrize("stream", [True, False])
async def test_many_prompts_and_choices(client, prompt, texts, stream):
    answer = await client.completions.create(
        model=MODEL, prompt=prompt, n=2, max_tokens=50, stream=stream, best_of=2
    )
    found = dict.fromkeys(range(texts * 2), "")
    for chunk in [chunk async for chunk in answer] if stream else [answer]:
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert found == dict.fromkeys(range(texts * 2), TEXT)
    if not stream:
        assert answer.usage.completion_tokens == texts * 2 * len(SCRIPT)


async def test_echo_with_logprobs(client):
    answer = await client.completions.create(
        model=MODEL, prompt="abc", max_tokens=2, echo=True, logprobs=2
    )
    (choice,) = answer.choices
    assert choice.text == "abc" + "".join(SCRIPT[:2])
    assert choice.finish_reason == "length"
    scores = choice.logprobs
    assert scores.tokens == ["a", "b", "c", *SCRIPT[:2]]
    assert scores.token_logprobs == [None, -1.5, -1.5, -0.25, -0.25]
    assert scores.text_offset == [0, 1, 2, 3, 8]
    assert scores.top_logprobs[0] is None
    assert scores.top_logprobs[3] == {"t0": -1.0, "t1": -9999.0, "Hello": -0.25}


async def test_stream_logprobs_continue_their_offsets(client):
    stream = await client.completions.create(
        model=MODEL, prompt="abc", max_tokens=3, logprobs=0, stream=True
    )
    chunks = [chunk.choices[0].logprobs async for chunk in stream]
    offsets = [offset for part in chunks if part is not None for offset in part.text_offset]
    assert offsets == [0, 5, 11]


async def test_prompt_logprobs(client):
    answer = await client.completions.create(
        model=MODEL, prompt="ab", max_tokens=1, extra_body={"prompt_logprobs": 1}
    )
    first, second = answer.choices[0].prompt_logprobs
    assert first is None
    assert sorted(second.values(), key=lambda entry: entry["rank"]) == [
        {"logprob": -1.0, "rank": 1, "decoded_token": "t0"},
        {"logprob": -1.5, "rank": 2, "decoded_token": "b"},
    ]


async def test_chat(client):
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}],
            },
        ],
        n=2,
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=20,
    )
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert [choice.message.role for choice in answer.choices] == ["assistant"] * 2
    scores = answer.choices[1].logprobs.content
    assert [score.token for score in scores] == list(SCRIPT)
    assert bytes(scores[2].bytes).decode() == SCRIPT[2]
    assert [top.token for top in scores[0].top_logprobs] == ["t0", "t1"]
    assert answer.usage.completion_tokens == 2 * len(SCRIPT)


async def test_chat_messages_reach_the_template(client, handler):
    await client.chat.completions.create(model=MODEL, messages=USER, max_tokens=1)
    prompt = handler.model.tokenizer.decode(handler.requests[-1].prompt_token_ids)
    assert prompt == "<user>hi<assistant>"


async def test_chat_stream(client):
    stream = await client.chat.completions.create(
        model=MODEL, messages=USER, n=2, stream=True, logprobs=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts, roles, finished, scored = {0: "", 1: ""}, {0: [], 1: []}, {}, 0
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.delta.role:
                assert texts[choice.index] == ""
                roles[choice.index].append(choice.delta.role)
            if choice.finish_reason:
                finished[choice.index] = choice.finish_reason
            scored += len(choice.logprobs.content) if choice.logprobs else 0
        usage = chunk.usage
    assert texts == {0: TEXT, 1: TEXT}
    assert roles == {0: ["assistant"], 1: ["assistant"]}
    assert finished == {0: "stop", 1: "stop"}
    assert scored == 2 * len(SCRIPT)
    assert usage.completion_tokens == 2 * len(SCRIPT)


async def test_every_sampling_field_reaches_the_engine(client, handler):
    await client.completions.create(
        model=MODEL, prompt="x", temperature=0.5, top_p=0.9, presence_penalty=0.1,
        frequency_penalty=0.2, max_tokens=5, stop=["a", "b"], seed=11, logit_bias={"5": -100},
        user="someone", extra_headers={"X-Request-Id": "mine-1"},
        extra_body={
            "top_k": 7, "min_p": 0.05, "repetition_penalty": 1.2, "min_tokens": 2,
            "stop_token_ids": [9], "ignore_eos": True, "include_stop_str_in_output": True,
            "skip_special_tokens": False, "no_repeat_ngram_size": 3, "priority": -4,
            "timeout": 9.5,
        },
    )  # fmt: skip
    request = handler.requests[-1]
    params = request.params
    assert (request.request_id, request.priority) == ("mine-1", -4)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.05)
    assert (params.presence_penalty, params.frequency_penalty) == (0.1, 0.2)
    assert (params.repetition_penalty, params.no_repeat_ngram_size) == (1.2, 3)
    assert (params.min_tokens, params.max_tokens, params.seed) == (2, 5, 11)
    assert (params.stop_token_ids, params.ignore_eos) == ((9,), True)
    assert params.logit_bias == ((5, -100.0),)


async def test_embeddings_in_both_encodings(client):
    plain = await client.embeddings.create(model=MODEL, input="abc", encoding_format="float")
    assert plain.data[0].embedding == [3.0, 3.125, 3.25, 3.375]
    packed = await client.embeddings.create(model=MODEL, input=["abc", "a"], dimensions=2)
    assert [entry.embedding for entry in packed.data] == [[3.0, 3.125], [1.0, 1.125]]
    ids = await client.embeddings.create(model=MODEL, input=[[1, 2], [3]], encoding_format="float")
    assert [entry.embedding[0] for entry in ids.data] == [2.0, 1.0]
    assert ids.usage.prompt_tokens == 3


REFUSALS = [
    (OverloadedError("full", retry_after_s=2.4), openai.RateLimitError, 429, "3"),
    (UnavailableError("starting"), openai.InternalServerError, 503, "1"),
    (WorkerDiedError("rank 1 died"), openai.InternalServerError, 503, "1"),
    (DeadlineExceededError("late"), openai.APIStatusError, 408, None),
    (InternalError("secret detail"), openai.InternalServerError, 500, None),
    (ZeroDivisionError("secret detail"), openai.InternalServerError, 500, None),
]


@pytest.mark.parametrize(("error", "kind", "status", "retry_after"), REFUSALS)
async def test_errors_before_the_first_byte(client, handler, error, kind, status, retry_after):
    handler.refuse_with = error
    for stream in (False, True):
        with pytest.raises(kind) as caught:
            await client.completions.create(model=MODEL, prompt="x", stream=stream)
        assert caught.value.status_code == status
        assert caught.value.response.headers.get("retry-after") == retry_after
        assert caught.value.body["type"]
        assert "secret" not in caught.value.response.text


async def test_failure_before_the_first_piece_of_a_stream_has_its_status(client, handler):
    handler.fail_after, handler.fail_with = 0, UnavailableError("replica lost")
    with pytest.raises(openai.InternalServerError) as caught:
        await client.completions.create(model=MODEL, prompt="x", stream=True)
    assert caught.value.status_code == 503
    assert handler.closed == 1


async def test_failure_inside_a_stream_is_an_event(client, handler):
    handler.fail_after, handler.fail_with = 2, UnavailableError("replica lost")
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    texts = [(await anext(stream)).choices[0].text for _ in range(2)]
    assert texts == list(SCRIPT[:2])
    with pytest.raises(openai.APIError, match="replica lost"):
        await anext(stream)
    await until(lambda: handler.closed == 1)


async def test_bad_values_are_bad_requests_that_name_the_field(client):
    with pytest.raises(openai.BadRequestError) as caught:
        await client.completions.create(model=MODEL, prompt="x", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model=MODEL, messages=USER, logprobs=True, top_logprobs=21
        )
    assert caught.value.param == "top_logprobs"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.completions.create(model="tiny/modl", prompt="x")
    assert MODEL in caught.value.message


async def test_one_refused_prompt_refuses_all(client, handler):
    with pytest.raises(openai.BadRequestError):
        await client.completions.create(model=MODEL, prompt=[[1], [10**6]])
    assert (handler.opened, handler.closed) == (1, 1)


async def test_the_synchronous_client(base_url):
    def ask():
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key="x", max_retries=0) as client:
            chat = client.chat.completions.create(model=MODEL, messages=USER)
            stream = client.completions.create(model=MODEL, prompt="x", stream=True)
            text = "".join(chunk.choices[0].text for chunk in stream)
            return chat.choices[0].message.content, text

    assert await asyncio.to_thread(ask) == (TEXT, TEXT)
