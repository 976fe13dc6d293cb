"""What a request wants its output to look like -> a grammar that every rank keeps to.

The grammar is in the form of llguidance. It is parsed here once, so that a bad one is an error of
the caller and never of a rank; compiling it against the vocabulary is up to the ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from llguidance import LLMatcher

from cluster.base.errors import InvalidRequestError
from router import field_checks as check
from router.served_model import ServedModel

PARAM = "structured_output"
MAX_BYTES = 64 * 1024
"""Longest schema, expression or grammar."""
MAX_CHOICES = 1024

JSON_WHITESPACE = r"(\n {0,20}| )?"
"""Between the tokens of JSON: a space, or a new line with its indentation. JSON allows any number,
and small models, or any at a high temperature, then write blanks until their tokens are used up."""


def output_grammar(raw: object, model: ServedModel) -> str:
    """The grammar of a request's output; empty when it may be anything.

    Args:
        raw: None, or a mapping with one of `json_schema` (an object, or its JSON text), `regex`,
            `choices` (a list of texts) and `lark` (a grammar in Lark's notation).

    Raises:
        InvalidRequestError: it is no such thing, or asks for what the grammar engine does not know.
    """
    if raw is None:
        return ""
    if not isinstance(raw, Mapping) or len(raw) != 1:
        raise check.bad_field(PARAM, f"must have exactly one of {', '.join(_KINDS)}")
    ((kind, value),) = raw.items()
    make = _KINDS.get(kind)
    if make is None:
        raise check.bad_field(
            PARAM, f"must have one of {', '.join(_KINDS)}, not '{check.shown(kind)}'"
        )
    if not model.plan.eos_token_ids:
        raise check.bad_field(PARAM, f"needs an end token, and {model.plan.name!r} has none")
    grammar = make(value)
    if problem := LLMatcher.validate_grammar(grammar):
        raise InvalidRequestError(
            f"{PARAM} cannot be followed: {_first_line(problem)}.",
            "Mend it, or say it with what is supported.",
            param=PARAM,
        )
    return grammar


def json_grammar(schema: str) -> str:
    """The grammar of JSON that a schema, given as JSON text, describes."""
    return LLMatcher.grammar_from_json_schema(
        schema, defaults={"whitespace_pattern": JSON_WHITESPACE}
    )


def _schema(value: object) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(check.text(PARAM, value, max_bytes=MAX_BYTES))
        except (ValueError, RecursionError):
            raise check.bad_field(PARAM, "holds a schema that is not JSON") from None
    if not isinstance(value, Mapping):
        raise check.bad_field(PARAM, "must hold a schema that is an object")
    text = check.text(PARAM, json.dumps(value, ensure_ascii=False), max_bytes=MAX_BYTES)
    return json_grammar(text)


def _regex(value: object) -> str:
    return LLMatcher.grammar_from_regex(check.text(PARAM, value, max_bytes=MAX_BYTES))


def _choices(value: object) -> str:
    texts = [check.text(PARAM, entry) for entry in check.items(PARAM, value, MAX_CHOICES)]
    if not texts or not all(texts):
        raise check.bad_field(PARAM, "must have choices, and none of them empty")
    options = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
    return LLMatcher.grammar_from_lark(check.text(PARAM, f"start: {options}", max_bytes=MAX_BYTES))


def _lark(value: object) -> str:
    return LLMatcher.grammar_from_lark(check.text(PARAM, value, max_bytes=MAX_BYTES))


def _first_line(problem: str) -> str:
    return check.shown(problem.strip().splitlines()[0]).rstrip(".")


_KINDS: Mapping[str, Callable[[object], str]] = {
    "json_schema": _schema,
    "regex": _regex,
    "choices": _choices,
    "lark": _lark,
}
