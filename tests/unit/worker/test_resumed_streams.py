"""Streams of real models that are cut anywhere go on in another engine to the undisturbed end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.speculation import SpeculationConfig
from tests.support.in_process_engine import in_process_engine
from tests.support.resumption import cut_and_resumed, deltas_of, put_together

MODELS = Path(__file__).parents[3] / "examples" / "models"
PROMPT = (5, 70, 71, 72, 73, 70, 71)
JSON = LLMatcher.grammar_from_json_schema('{"enum": ["class", {"lines": [1, 22]}]}')
SNAKE = LLMatcher.grammar_from_regex("[a-z]{3,8}(_[a-z]{3,8}){2}")


def request(name: str, **params: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=PROMPT,
        params=SamplingParams(**({"seed": 1, "max_tokens": 20} | params)),
    )


REQUESTS = [
    request("greedy", temperature=0.0, logprobs=2, ignore_eos=True),
    request("sampled", temperature=0.9, top_p=0.9, top_k=50, n=2, logprobs=1),
    request(
        "penalised",
        repetition_penalty=1.2,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        logit_bias=tuple((token, 6.0) for token in range(70, 76)),
    ),
    request(
        "no-repeat",
        no_repeat_ngram_size=2,
        logit_bias=tuple((token, 20.0) for token in range(70, 74)),
        ignore_eos=True,
    ),
    request("short", temperature=1.5, min_tokens=6, stop_token_ids=tuple(range(60, 120))),
    request("scored", prompt_logprobs=1, n=2, max_tokens=6),
    request("json", grammar=JSON, max_tokens=40),
    request("regex", grammar=SNAKE, n=2, seed=4, max_tokens=30),
]


@pytest.mark.parametrize("model", ["demo-dense", "demo-moe"])
@pytest.mark.parametrize("each", REQUESTS, ids=lambda each: each.request_id)
def test_every_cut_goes_on_to_the_undisturbed_end(each: GenerationRequest, model: str) -> None:
    deltas = deltas_of(in_process_engine(MODELS / model), each)
    whole = put_together(each, deltas)
    assert all(choice.error is None for choice in whole)
    other = in_process_engine(
        MODELS / model, speculation=SpeculationConfig(num_tokens=3), max_step_tokens=16
    )
    for cut in range(1, len(deltas) + 1):  # at 0 it is a request like any other
        assert cut_and_resumed(each, deltas, cut, other) == whole, cut
