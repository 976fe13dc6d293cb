"""The validator: every limit, strict types, named fields; and that both fronts' forms agree."""

import math
from dataclasses import replace

import pytest
from gateway_harness import LIMITS, MODEL, VOCAB, model_plan
from hypothesis import given
from hypothesis import strategies as st

from cluster.base.errors import (
    ContextTooLongError,
    InvalidRequestError,
    UnknownModelError,
    UserError,
)
from replicas.api import SamplingParams
from replicas.text.generation_defaults import GenerationDefaults
from router.api import ChatTurn, EmbedInput, GenerationInput, ScoreInput, TextOrIds
from router.grpc.codec import sampling_fields
from router.proto import penstock_pb2 as pb
from router.sampling_fields import FIELDS
from router.served_model import ServedModel
from router.validate import Validator

# One entry per hostile value: (sampling field, raw value).
BAD_SAMPLING = [
    ("temperature", "hot"), ("temperature", -0.1), ("temperature", 2.1), ("temperature", 1e308),
    ("temperature", math.nan), ("temperature", math.inf), ("temperature", True),
    ("temperature", 10**400), ("temperature", []),
    ("top_p", -0.1), ("top_p", 1.1), ("top_p", 0), ("top_p", math.nan), ("top_p", "1"),
    ("min_p", -0.01), ("min_p", 1.01), ("min_p", False),
    ("top_k", -1), ("top_k", -5), ("top_k", 1.0), ("top_k", 2**31), ("top_k", True),
    ("repetition_penalty", 0), ("repetition_penalty", -1), ("repetition_penalty", math.inf),
    ("presence_penalty", 99), ("presence_penalty", -2.1), ("frequency_penalty", -99),
    ("frequency_penalty", "0"), ("no_repeat_ngram_size", -1), ("no_repeat_ngram_size", 10**9),
    ("max_tokens", "ten"), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", [1]),
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", -(2**63)), ("max_tokens", 2**63),
    ("min_tokens", 10**9), ("min_tokens", -1), ("min_tokens", 17),
    ("n", 0), ("n", -1), ("n", 1.5), ("n", 9), ("n", 10**9), ("n", True), ("n", "2"),
    ("logprobs", 10**6), ("logprobs", -7), ("logprobs", 21), ("logprobs", True),
    ("prompt_logprobs", 21), ("prompt_logprobs", -1),
    ("seed", 2**63), ("seed", 2**70), ("seed", -(2**63) - 1), ("seed", 1.0), ("seed", "1"),
    ("stop", 5), ("stop", [5]), ("stop", [["a"]]), ("stop", ""), ("stop", [""]),
    ("stop", ["a"] * 5), ("stop", ["x"] * 10_000), ("stop", "x" * 257), ("stop", "\ud800"),
    ("stop", {"a": 1}),
    ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", [VOCAB]),
    ("stop_token_ids", [True]), ("stop_token_ids", [1.0]), ("stop_token_ids", [1] * 1000),
    ("stop_token_ids", [2**64]),
    ("logit_bias", [1]), ("logit_bias", "abc"), ("logit_bias", {-5: 1}),
    ("logit_bias", {VOCAB: 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"-1": 1}),
    ("logit_bias", {"1": "abc"}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": math.nan}),
    ("logit_bias", {"1": 1, 1: 2}), ("logit_bias", {"1" * 4000: 1}), ("logit_bias", {"²": 1}),
    ("logit_bias", {str(at): 0 for at in range(301)}), ("logit_bias", {True: 1}),
    ("ignore_eos", 1), ("ignore_eos", "yes"), ("include_stop_in_output", 0),
    ("skip_special_tokens", "no"),
    ("best_of", 2), ("chat_template", "{{ 1 }}"), ("prompt_embeds", "AAAA"), ("temprature", 1),
]  # fmt: skip

BAD_INPUTS = {
    "no prompt": {},
    "two prompts": {"text": "a", "token_ids": [1]},
    "text and messages": {"text": "a", "messages": [ChatTurn(role="user", content="x")]},
    "number": {"text": 5},
    "object": {"text": {"a": 1}},
    "empty text": {"text": ""},
    "lone surrogate": {"text": "a\ud800b"},
    "empty ids": {"token_ids": []},
    "nested ids": {"token_ids": [[1]]},
    "mixed ids": {"token_ids": [1, "a"]},
    "float ids": {"token_ids": [1.0]},
    "bool ids": {"token_ids": [True]},
    "negative id": {"token_ids": [-1]},
    "id beyond the vocabulary": {"token_ids": [VOCAB]},
    "id beyond 64 bits": {"token_ids": [2**70]},
    "ids as text": {"token_ids": "123"},
    "no messages": {"messages": []},
    "messages as text": {"messages": "hi"},
    "null message": {"messages": [None]},
    "dict message": {"messages": [{"role": "user"}]},
    "unknown role": {"messages": [ChatTurn(role="robot", content="x")]},
    "numeric role": {"messages": [ChatTurn(role=3, content="x")]},
    "null content": {"messages": [ChatTurn(role="user", content=None)]},
    "list content": {"messages": [ChatTurn(role="user", content=["x"])]},
    "surrogate content": {"messages": [ChatTurn(role="user", content="\udfff")]},
    "long name": {"messages": [ChatTurn(role="user", content="x", name="n" * 257)]},
    "too many messages": {"messages": [ChatTurn(role="user", content="x")] * 1025},
    "echo in chat": {"messages": [ChatTurn(role="user", content="x")], "echo": True},
    "echo as number": {"text": "a", "echo": 1},
    "priority beyond 32 bits": {"text": "a", "priority": 2**31},
    "boolean priority": {"text": "a", "priority": True},
    "negative timeout": {"text": "a", "timeout_s": -1},
    "NaN timeout": {"text": "a", "timeout_s": math.nan},
    "endless timeout": {"text": "a", "timeout_s": math.inf},
    "id with a line break": {"text": "a", "request_id": "a\r\nb"},
    "long id": {"text": "a", "request_id": "a" * 65},
    "id with an accent": {"text": "a", "request_id": "é"},
    "numeric id": {"text": "a", "request_id": 7},
}


@pytest.fixture(scope="module")
def model(checkpoint):
    return ServedModel.from_plan(model_plan(checkpoint))


@pytest.fixture(scope="module")
def validator(model):
    return Validator({MODEL: model, "tiny-chat": model}, LIMITS, draw_seed=lambda: 99)


def build(validator, model, **fields):
    """What the gateway does: check, tokenise, build."""
    raw = GenerationInput(**{"model": MODEL, **fields})
    checked = validator.check_generation(raw)
    prompt = checked.prompt
    if prompt.messages is not None:
        ids = model.encode_chat(prompt.messages)
    elif prompt.text is not None:
        ids = model.tokenizer.encode(prompt.text)
    else:
        ids = prompt.token_ids
    return checked, validator.build_generation(checked, ids)


@pytest.mark.parametrize(("name", "value"), BAD_SAMPLING)
def test_bad_sampling_field_is_refused_by_name(validator, model, name, value):
    with pytest.raises(InvalidRequestError) as caught:
        build(validator, model, text="abc", sampling={name: value})
    assert caught.value.param == name
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_with_a_field(validator, model, case):
    with pytest.raises(InvalidRequestError) as caught:
        build(validator, model, **BAD_INPUTS[case])
    assert caught.value.param
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["tinny", "../../etc/passwd", "a\r\nb\x1b[31m", "x" * 200_000])
def test_unknown_model_is_named_short_and_printable(validator, name):
    with pytest.raises(UnknownModelError) as caught:
        validator.model(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400
    assert "tiny" in caught.value.remedy


@pytest.mark.parametrize("name", [None, 5, "", ["tiny"], True])
def test_missing_model_is_a_bad_field(validator, name):
    with pytest.raises(InvalidRequestError, match="model"):
        validator.model(name)


def test_unset_fields_are_neutral(validator, model):
    _, request = build(validator, model, text="abc")
    assert request.params == SamplingParams(seed=99)
    _, request = build(validator, model, text="abc", sampling=dict.fromkeys(FIELDS))
    assert request.params == SamplingParams(seed=99)


def test_checkpoint_defaults_fill_unset_fields_and_yield_to_set_ones(validator, model):
    defaults = GenerationDefaults(
        temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.1, max_new_tokens=33
    )
    tuned = replace(model, defaults=defaults)
    validator = Validator({MODEL: tuned}, LIMITS, draw_seed=lambda: 0)
    _, request = build(validator, tuned, text="abc")
    params = request.params
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 20, 0.9)
    assert (params.repetition_penalty, params.max_tokens) == (1.1, 33)
    sampling = {"temperature": 0, "top_k": 0, "max_tokens": 2}
    _, request = build(validator, tuned, text="abc", sampling=sampling)
    params = request.params
    assert (params.temperature, params.top_k, params.max_tokens) == (0.0, 0, 2)


def test_default_length_never_passes_the_context(validator, model):
    _, request = build(validator, model, text="a" * 1020)
    assert request.params.max_tokens == 4
    _, request = build(validator, model, messages=[ChatTurn(role="user", content="a" * 900)])
    assert len(request.prompt_token_ids) + request.params.max_tokens == 1024


def test_kv_capacity_bounds_a_request_below_the_context(checkpoint):
    plan = model_plan(checkpoint)
    small = ServedModel.from_plan(replace(plan, kv=replace(plan.kv, num_blocks=4)))
    validator = Validator({MODEL: small}, LIMITS, draw_seed=lambda: 0)
    with pytest.raises(ContextTooLongError, match="64 tokens"):
        build(validator, small, text="a" * 60, sampling={"max_tokens": 5})
    build(validator, small, text="a" * 60, sampling={"max_tokens": 4})


def test_prompt_only_needs_a_reason(validator, model):
    _, request = build(validator, model, text="a" * 1024, echo=True, sampling={"max_tokens": 0})
    assert request.params.max_tokens == 0
    sampling = {"max_tokens": 0, "prompt_logprobs": 0}
    _, request = build(validator, model, text="a", sampling=sampling)
    assert request.params.prompt_logprobs == 0


@pytest.mark.parametrize("content", ["", "\x00\x07", "\u202eabc", "e" + "\u0301" * 20, "<|bos|>"])
def test_odd_text_is_served(validator, model, content):
    _, request = build(validator, model, messages=[ChatTurn(role="user", content=content)])
    text = model.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert f"<|im_start|>user\n{content}<|im_end|>" in text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [TextOrIds(text="a")] * 65}, "inputs"),
        ({"inputs": [TextOrIds()]}, "inputs[0]"),
        ({"inputs": [TextOrIds(text="a"), TextOrIds(text="")]}, "inputs[1]"),
        ({"inputs": [TextOrIds(text="a", token_ids=[1])]}, "inputs[0]"),
        ({"inputs": ["a"]}, "inputs[0]"),
        ({"inputs": "abc"}, "inputs"),
        ({"inputs": [TextOrIds(token_ids=[VOCAB])]}, "inputs[0]"),
        ({"pooling": "max"}, "pooling"),
        ({"pooling": 3}, "pooling"),
        ({"normalize": 1}, "normalize"),
        ({"dimensions": -1}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dimensions": 2**40}, "dimensions"),
    ],
)
def test_bad_embedding_request_is_refused(validator, fields, param):
    raw = EmbedInput(**{"model": MODEL, "inputs": [TextOrIds(text="a")], **fields})
    with pytest.raises(InvalidRequestError) as caught:
        validator.check_embed(raw)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": TextOrIds()}, "prompt"),
        ({"prompt": TextOrIds(text="")}, "prompt"),
        ({"continuations": []}, "continuations"),
        ({"continuations": [TextOrIds(text="")]}, "continuations[0]"),
        ({"timeout_s": "1"}, "timeout_s"),
    ],
)
def test_bad_score_request_is_refused(validator, fields, param):
    good = {"prompt": TextOrIds(text="a"), "continuations": [TextOrIds(text="b")]}
    with pytest.raises(InvalidRequestError) as caught:
        validator.check_score(ScoreInput(model=MODEL, **{**good, **fields}))
    assert caught.value.param == param


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), json_values, max_size=4), json_values)
def test_any_json_is_accepted_or_refused_with_a_user_error(validator, model, sampling, ids):
    try:
        _, request = build(validator, model, token_ids=ids, sampling=sampling)
    except UserError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert refused.param
    else:
        params = request.params
        assert 0 <= params.temperature <= 2
        assert 0 < params.top_p <= 1
        assert 1 <= params.n <= LIMITS.max_choices
        assert len(request.prompt_token_ids) + params.max_tokens <= 1024
        assert -(2**63) <= params.seed < 2**63


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(),
            "top_k": st.integers(-(2**31), 2**31 - 1),
            "max_tokens": st.integers(-(2**31), 2**31 - 1),
            "stop": st.lists(st.text(max_size=4), min_size=1, max_size=6),
            "n": st.integers(-1, 12),
            "ignore_eos": st.booleans(),
            "seed": st.integers(-(2**63), 2**63 - 1),
        },
    )
)
def test_protobuf_form_means_what_the_json_form_means(validator, model, fields):
    from_proto = sampling_fields(pb.SamplingOptions(**fields))

    def outcome(sampling):
        try:
            return build(validator, model, text="abc", sampling=sampling)[1].params
        except UserError as error:
            return str(error)

    assert outcome(from_proto) == outcome(fields)
