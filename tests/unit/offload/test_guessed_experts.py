"""Experts that are read on a guess: the tokens of a resident model, and hardly a byte too many."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from offload.provider import StreamedWeights
from replicas.api import GenerationRequest, SamplingParams
from tests.support.in_process_engine import in_process_engine
from tests.support.offload_engine import offload_plan, unit_names, weights_of
from tests.support.tiny_mixtures import ROPE

DEMO = Path(__file__).parents[3] / "examples" / "models" / "demo-moe"


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 24 experts, whose residual stream changes as slowly as a trained model's."""
    sizes = {"num_hidden_layers": 6, "num_local_experts": 24, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**(ROPE | sizes))).float().eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            scale = 1.0 if "embed" in name else 0.5 if name.endswith("gate.weight") else 0.02
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    path = tmp_path_factory.mktemp("wide") / "mixtral"
    model.save_pretrained(path)
    return path


def requests_of(count: int, num_tokens: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=tuple(range(5 + index, 9 + 4 * index)),
            params=SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
        )
        for index in range(count)
    ]


def streamed(
    path: Path, disk: Path, requests: list[GenerationRequest], slots: int, *, guesses: bool = True
) -> tuple[list[list[int]], StreamedWeights]:
    """Tokens and provider of a run in which all but the experts is resident."""
    stay = tuple(name for name in unit_names(path) if ".expert." not in name)
    made: list[StreamedWeights] = []

    def factory(request):
        weights = weights_of(offload_plan(disk, resident_units=stay, expert_slots=slots))(request)
        if not guesses:
            weights.foresee = lambda layer, guess: None
        made.append(weights)
        return weights

    engine = in_process_engine(path, weights_factory=factory)
    return [c.token_ids for c in engine.generate(requests)], made[0]


@pytest.mark.parametrize(("model", "slots"), [("wide", 36), ("demo", 12), ("demo", 5)])
def test_tokens_are_those_of_a_resident_model_for_few_bytes_more(
    model: str, slots: int, wide: Path, tmp_path: Path
) -> None:
    path = wide if model == "wide" else DEMO
    requests = requests_of(2, 24)
    tokens, weights = streamed(path, tmp_path, requests, slots)
    plain_tokens, plain = streamed(path, tmp_path, requests, slots, guesses=False)
    assert tokens == plain_tokens
    assert tokens == [c.token_ids for c in in_process_engine(path).generate(requests)]
    stats = weights.stats
    size = stats.experts.num_bytes / stats.experts.num_reads
    assert stats.experts.num_bytes <= 1.15 * size * stats.num_expert_misses + 8 * size
    assert stats.experts.num_bytes <= 1.15 * plain.stats.experts.num_bytes + 8 * size
    if model == "wide":
        assert stats.num_early_useful > 4 * stats.num_early_wasted
        assert stats.num_early_useful > 0.2 * stats.num_expert_misses
