"""Killed anywhere and resumed is undisturbed: what a client gets of a real model, cut by cut."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from gateway_harness import MODEL, Gateway, model_plan, running_gateway, until
from hops import FAST
from mortal_engine import Fate, ModelEngine, MortalEngine

from router.api import ChatTurn, GenerationInput, Usage
from router.client_codec import Completion, completions
from router.resume import Outcome

DENSE = Path(__file__).parents[3] / "examples" / "models" / "demo-dense"
PROMPT = "def main(self, name):\n    return "


def generation(**fields: Any) -> GenerationInput:
    sampling = {"max_tokens": 14, "seed": 5, "ignore_eos": True} | fields.pop("sampling", {})
    if "messages" not in fields:
        fields.setdefault("text", PROMPT)
    return GenerationInput(model=MODEL, sampling=sampling, **fields)


CASES = {
    "greedy": generation(sampling={"temperature": 0.0, "logprobs": 2}),
    "sampled-choices": generation(sampling={"temperature": 1.0, "n": 2, "logprobs": 0}),
    "penalised": generation(
        sampling={
            "temperature": 0.7,
            "repetition_penalty": 1.2,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "no_repeat_ngram_size": 3,
        }
    ),
    "stops": generation(sampling={"stop": ["elf.", "\n\n", "re"], "min_tokens": 3, "n": 3}),
    "echo": generation(echo=True, sampling={"prompt_logprobs": 1, "max_tokens": 5}),
    "short": generation(sampling={"min_tokens": 5, "stop_token_ids": list(range(200, 328))}),
    "json": generation(
        sampling={
            "max_tokens": 24,
            "ignore_eos": False,
            "structured_output": {
                "json_schema": {
                    "type": "object",
                    "properties": {"kind": {"enum": ["class", "function"]}},
                    "required": ["kind"],
                    "additionalProperties": False,
                }
            },
        }
    ),
    "chat": generation(messages=[ChatTurn(role="user", content="write a class")]),
}


async def answer(gateway: Gateway, request: GenerationInput) -> tuple[list[Completion], Usage]:
    generated = await gateway.handler.generate(request)
    pieces = [piece async for piece in generated.pieces]
    return completions(pieces), pieces[-1].usage


async def whole(gateway: Gateway) -> None:
    """All replicas are reached again."""
    num_replicas = len(gateway.replicas)
    await until(lambda: len(gateway.directory.snapshot(MODEL)) == num_replicas)


@pytest.mark.parametrize("says_so", [False, True], ids=["cut", "failed"])
@pytest.mark.parametrize("name", CASES)
async def test_every_cut_of_every_kind_of_request(name: str, says_so: bool) -> None:
    request, fate = CASES[name], Fate()
    engines = [MortalEngine(ModelEngine(DENSE, prefix_caching=False), fate) for _ in range(2)]
    plan = model_plan(DENSE, vocab_size=2048, eos_token_ids=(0, 2))
    async with running_gateway(
        DENSE, engines=engines, plan=plan, hop=FAST, resume_wait_s=10.0
    ) as gateway:
        undisturbed = await answer(gateway, request)
        for steps in itertools.count():
            await until(lambda: not any(engine.num_running for engine in engines))
            await whole(gateway)
            fate.plan(steps, says_so=says_so)
            assert await answer(gateway, request) == undisturbed, steps
            if not fate.num_deaths:
                break
            assert gateway.moves[-1].outcome is Outcome.RESUMED
            fate.num_deaths = 0
        assert len(gateway.moves) == steps
        assert steps > 4
