"""Raw sampling fields of a request -> `SamplingParams` and the options of its text side.

The names are those of the public proto's `SamplingOptions`. An absent field (or null) takes the
model's generation_config.json value, then the neutral one. Unknown names are refused: a setting is
never ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.base.errors import InvalidRequestError
from cluster.base.front_plan import LimitsPlan
from router import field_checks as check
from router.served_model import ServedModel
from router.structured_output import output_grammar

INT32_MAX = 2**31 - 1
MAX_STOP_BYTES = 256
MAX_STOP_TOKEN_IDS = 128
MAX_REPETITION_PENALTY = 100.0
MAX_NGRAM_SIZE = 1024

FIELDS = frozenset(
    {
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "no_repeat_ngram_size",
        "logit_bias",
        "min_tokens",
        "max_tokens",
        "stop",
        "stop_token_ids",
        "include_stop_in_output",
        "ignore_eos",
        "seed",
        "n",
        "logprobs",
        "prompt_logprobs",
        "skip_special_tokens",
        "structured_output",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """What the text side of a generation does with its tokens."""

    stop: tuple[str, ...] = ()
    include_stop_in_output: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0
    """Stop strings are looked for after this many tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFields:
    """Checked sampling fields; `max_tokens` waits for the prompt's length."""

    params: dict[str, Any]
    """Keyword arguments of `SamplingParams`, without `max_tokens`."""
    max_tokens: int | None
    text: TextOptions


def check_sampling(
    raw: Mapping[str, Any], model: ServedModel, limits: LimitsPlan
) -> SamplingFields:
    """Check every sampling field.

    Raises:
        InvalidRequestError: naming the first field at fault.
    """
    given = {name: value for name, value in raw.items() if value is not None}
    for name in given:
        if name not in FIELDS:
            raise _unknown_field(name)
    max_tokens = given.get("max_tokens")
    if max_tokens is not None:
        max_tokens = check.integer("max_tokens", max_tokens, 0, INT32_MAX)
    params = {
        **_numbers(given, model),
        **_integers(given, model, limits),
        "logit_bias": _logit_bias(given.get("logit_bias", {}), model, limits),
        "stop_token_ids": _stop_token_ids(given.get("stop_token_ids", ()), model),
        "ignore_eos": check.boolean("ignore_eos", given.get("ignore_eos", False)),
        "grammar": output_grammar(given.get("structured_output"), model),
    }
    _check_end(params)
    return SamplingFields(
        params=params, max_tokens=max_tokens, text=_text_options(given, limits, params)
    )


def _check_end(params: Mapping[str, Any]) -> None:
    """A grammar says where the output ends, by an end token."""
    for name in ("ignore_eos", "min_tokens"):
        if params["grammar"] and params[name]:
            raise check.bad_field(name, "contradicts a structured output", "Leave one out.")


def _unknown_field(name: object) -> InvalidRequestError:
    near = difflib.get_close_matches(str(name)[:64], FIELDS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "See the API reference for the fields."
    return InvalidRequestError(
        f"Unknown sampling field '{check.shown(name)}'.", hint, param=check.shown(name)
    )


def _numbers(given: Mapping[str, Any], model: ServedModel) -> dict[str, float]:
    defaults = model.defaults

    def read(name: str, low: float, high: float, neutral: float, **how: bool) -> float:
        if name in given:
            return check.number(name, given[name], low, high, **how)
        configured = getattr(defaults, name, None)
        return neutral if configured is None else float(configured)

    return {
        "temperature": read("temperature", 0.0, 2.0, 1.0),
        "top_p": read("top_p", 0.0, 1.0, 1.0, low_excluded=True),
        "min_p": read("min_p", 0.0, 1.0, 0.0),
        "repetition_penalty": read(
            "repetition_penalty", 0.0, MAX_REPETITION_PENALTY, 1.0, low_excluded=True
        ),
        "presence_penalty": read("presence_penalty", -2.0, 2.0, 0.0),
        "frequency_penalty": read("frequency_penalty", -2.0, 2.0, 0.0),
    }


def _integers(
    given: Mapping[str, Any], model: ServedModel, limits: LimitsPlan
) -> dict[str, int | None]:
    def read(name: str, low: int, high: int, neutral: int | None) -> int | None:
        return check.integer(name, given[name], low, high) if name in given else neutral

    return {
        "top_k": read("top_k", 0, INT32_MAX, model.defaults.top_k or 0),
        "no_repeat_ngram_size": read("no_repeat_ngram_size", 0, MAX_NGRAM_SIZE, 0),
        "min_tokens": read("min_tokens", 0, INT32_MAX, 0),
        "seed": read("seed", -(2**63), 2**63 - 1, None),
        "n": read("n", 1, limits.max_choices, 1),
        "logprobs": read("logprobs", 0, limits.max_logprobs, None),
        "prompt_logprobs": read("prompt_logprobs", 0, limits.max_logprobs, None),
    }


def _logit_bias(
    raw: object, model: ServedModel, limits: LimitsPlan
) -> tuple[tuple[int, float], ...]:
    if not isinstance(raw, Mapping):
        raise check.bad_field("logit_bias", "must map token ids to numbers")
    if len(raw) > limits.max_logit_bias:
        raise check.bad_field("logit_bias", f"must have at most {limits.max_logit_bias} entries")
    biases: dict[int, float] = {}
    for key, value in raw.items():
        token_id = check.integer("logit_bias", _json_key(key), 0, model.plan.vocab_size - 1)
        if token_id in biases:
            raise check.bad_field("logit_bias", f"names token {token_id} twice")
        biases[token_id] = check.number("logit_bias", value, -100.0, 100.0)
    return tuple(biases.items())


def _json_key(key: object) -> object:
    """JSON objects have string keys; only plain decimal ones are ids."""
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        return int(key)
    return key


def _stop_token_ids(raw: object, model: ServedModel) -> tuple[int, ...]:
    return check.token_ids(
        "stop_token_ids", raw, vocab_size=model.plan.vocab_size, limit=MAX_STOP_TOKEN_IDS
    )


def _text_options(
    given: Mapping[str, Any], limits: LimitsPlan, params: Mapping[str, Any]
) -> TextOptions:
    raw_stop = given.get("stop", ())
    entries = (raw_stop,) if isinstance(raw_stop, str) else raw_stop
    stops = []
    for entry in check.items("stop", entries, limits.max_stop_strings):
        stop = check.text("stop", entry, max_bytes=MAX_STOP_BYTES)
        if not stop:
            raise check.bad_field("stop", "must not hold an empty string")
        stops.append(stop)
    return TextOptions(
        stop=tuple(stops),
        include_stop_in_output=check.boolean(
            "include_stop_in_output", given.get("include_stop_in_output", False)
        ),
        skip_special_tokens=check.boolean(
            "skip_special_tokens", given.get("skip_special_tokens", True)
        ),
        min_tokens=params["min_tokens"],
    )
