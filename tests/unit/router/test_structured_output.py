"""What clients may ask of an output over gRPC, and that a model without an end refuses it."""

import dataclasses

import pytest
from gateway_harness import model_plan
from llguidance import LLMatcher, LLTokenizer

from cluster.base.errors import InvalidRequestError
from router.client_codec import sampling_message
from router.grpc.codec import sampling_fields
from router.served_model import ServedModel
from router.structured_output import json_grammar, output_grammar

FORMS = [
    ({"json_schema": {"type": "null"}}, json_grammar('{"type": "null"}')),
    ({"json_schema": '{"type": "null"}'}, json_grammar('{"type": "null"}')),
    ({"regex": "[0-9]+"}, LLMatcher.grammar_from_regex("[0-9]+")),
    ({"choices": ["a", "b"]}, LLMatcher.grammar_from_lark('start: "a" | "b"')),
    ({"lark": 'start: "a"'}, LLMatcher.grammar_from_lark('start: "a"')),
]


@pytest.fixture(scope="module")
def model(checkpoint):
    return ServedModel.from_plan(model_plan(checkpoint))


@pytest.mark.parametrize(("form", "grammar"), FORMS, ids=str)
def test_the_client_and_the_front_agree_on_every_form(model, form, grammar):
    message = sampling_message({"structured_output": form})
    assert output_grammar(sampling_fields(message)["structured_output"], model) == grammar


def test_an_empty_message_is_refused(model):
    message = sampling_message({"structured_output": {}})
    with pytest.raises(InvalidRequestError, match="exactly one of json_schema"):
        output_grammar(sampling_fields(message)["structured_output"], model)


def test_the_client_refuses_a_form_it_does_not_know():
    with pytest.raises(InvalidRequestError, match="yaml"):
        sampling_message({"structured_output": {"yaml": "a: 1"}})


def test_a_model_without_an_end_token_cannot_say_where_the_output_ends(model):
    endless = dataclasses.replace(model, plan=dataclasses.replace(model.plan, eos_token_ids=()))
    with pytest.raises(InvalidRequestError, match="needs an end token"):
        output_grammar({"regex": "a"}, endless)


PAIR = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ('{"a":1}', True),
        ('{ "a": 1 }', True),
        ('{\n    "a": 1\n}', True),
        ('{\n\n"a": 1}', False),
        ('{  "a": 1}', False),
        ("{\n" + " " * 21 + '"a": 1}', False),
    ],
)
def test_blanks_between_the_tokens_of_json_end(model, text, follows):
    bytes_ = LLTokenizer("byte")
    tokens = bytes_.tokenize_str(text)
    matcher = LLMatcher(bytes_, output_grammar({"json_schema": PAIR}, model))
    assert (matcher.validate_tokens(tokens) == len(tokens)) is follows


def test_a_schema_may_say_otherwise(model):
    grammar = output_grammar(
        {"json_schema": PAIR | {"x-guidance": {"whitespace_pattern": "_*"}}}, model
    )
    bytes_ = LLTokenizer("byte")
    tokens = bytes_.tokenize_str('{___"a"_:1}')
    assert LLMatcher(bytes_, grammar).validate_tokens(tokens) == len(tokens)
