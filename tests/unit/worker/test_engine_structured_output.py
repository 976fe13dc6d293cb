"""Outputs that have to match a grammar do, and are the same tokens whatever else goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher

from replicas.api import FinishReason, GenerationRequest, SamplingParams
from replicas.engine.speculation import SpeculationConfig
from replicas.engine.sync_engine import Completion, SyncEngine
from replicas.text.tokenizer import Tokenizer
from tests.support.in_process_engine import generate_pipelined, in_process_engine

MODELS = Path(__file__).parents[3] / "examples" / "models"
DENSE = MODELS / "demo-dense"
ROOM = {"max_context": 256, "num_blocks": 512}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["class", "function"]},
        "lines": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "kind", "lines"],
    "additionalProperties": False,
}
JSON = LLMatcher.grammar_from_json_schema(
    json.dumps(SCHEMA), overrides={"whitespace_flexible": False}
)
LONG = LLMatcher.grammar_from_regex("[a-z]{80}(\n[a-z]{40})?")
SNAKE = LLMatcher.grammar_from_regex("[a-z]{3,8}(_[a-z]{3,8}){2}")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(DENSE)


def request(name: str, grammar: str, **params: Any) -> GenerationRequest:
    settings = {"temperature": 1.0, "seed": 1, "max_tokens": 120} | params
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=(5, 70, 71, 72, 73),
        params=SamplingParams(grammar=grammar, **settings),
    )


REQUESTS = [
    request("json", JSON),
    request("free", "", max_tokens=110, ignore_eos=True),
    request("snake", SNAKE, seed=4, n=2),
    request("long", LONG, seed=7, n=3),
    request("greedy", JSON, temperature=0.0, logprobs=2),
    request("penalised", SNAKE, repetition_penalty=1.1, top_p=0.9, presence_penalty=0.3),
]


def said(completions: list[Completion]) -> list[tuple[object, ...]]:
    return [(c.token_ids, c.finish_reason, c.stop_token_id, c.error) for c in completions]


@pytest.mark.parametrize("path", [DENSE, MODELS / "demo-moe"], ids=["dense", "mixture"])
def test_every_answer_is_an_instance_of_its_schema(path: Path, tokenizer: Tokenizer) -> None:
    engine = in_process_engine(path, **ROOM)
    requests = [request(f"r{seed}", JSON, seed=seed, temperature=0.8) for seed in range(8)]
    whole = 0
    for answer in engine.generate(requests):
        text = tokenizer.decode(answer.token_ids)
        if answer.finish_reason is FinishReason.LENGTH:  # a number may go on for ever
            continue
        whole += 1
        value = json.loads(text)
        assert list(value) == ["name", "kind", "lines"]
        assert len(value["name"]) <= 12
        assert value["kind"] in ("class", "function")
        assert len(value["lines"]) <= 3
        assert all(type(line) is int for line in value["lines"])
        assert answer.stop_token_id in (0, 2)
    assert whole >= 6


@pytest.fixture(scope="module")
def alone() -> list[tuple[object, ...]]:
    """What each request is told when nothing else runs."""
    engine = in_process_engine(DENSE, **ROOM)
    return [answer for each in REQUESTS for answer in said(engine.generate([each]))]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_step_tokens": 5},
        {"num_blocks": 31, "max_step_tokens": 16, "prefix_caching": False},
        {"speculation": SpeculationConfig(num_tokens=6, min_ngram=1, max_ngram=3)},
    ],
    ids=["together", "small steps", "preempted", "drafts"],
)
@pytest.mark.parametrize("generate", [SyncEngine.generate, generate_pipelined])
def test_batches_preemption_drafts_and_steps_in_flight_change_no_token(
    alone: list[tuple[object, ...]], limits: dict[str, Any], generate: Any
) -> None:
    engine = in_process_engine(DENSE, **(ROOM | limits))
    assert said(generate(engine, REQUESTS)) == alone
    assert (engine.stats.num_preemptions > 0) == ("num_blocks" in limits)
    assert (engine.stats.draft_tokens > 0) == ("speculation" in limits)
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_total


def test_a_grammar_that_is_none_ends_its_request_alone(alone: list[tuple[object, ...]]) -> None:
    engine = in_process_engine(DENSE, **ROOM)
    bad = dataclasses.replace(REQUESTS[0], request_id="bad", params=SamplingParams(grammar="no"))
    failed, *others = generate_pipelined(engine, [bad, *REQUESTS])
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error is not None
    assert said(others) == alone
