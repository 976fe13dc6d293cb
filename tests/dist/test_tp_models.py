"""Tensor parallelism changes nothing: two and four gloo ranks give one rank's greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.rank_processes import run_ranks, values
from tests.support.stepping import Stepper
from tests.support.tiny_models import prompt_tokens, write_checkpoint

# Every way of cutting tensors; RoPE scaling and windows do not touch it.
VARIANTS = (
    "llama",
    "llama_biased",
    "llama_tied_wide",
    "mistral",
    "qwen2_mixed",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt_oss",
    "deepseek_v2",
    "deepseek_v3",
    "mixtral_uneven",
    "pr_moe",
    "gpt2",
    "gpt2_scaled",
    "opt",
    "opt_350m",
    "opt_bare",
)
PROMPTS = {name: prompt_tokens(15, index) for index, name in enumerate(VARIANTS)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tp")
    for name in VARIANTS:
        write_checkpoint(name, root / name)
    return root


@pytest.fixture(scope="module")
def one_rank(checkpoints: Path) -> dict[str, Any]:
    answers = {}
    for name, prompt in PROMPTS.items():
        stepper = Stepper.load(checkpoints / name)
        row = stepper.step({"probe": prompt})["probe"][-1]
        answers[name] = {"tokens": stepper.greedy(prompt, 16), "last_row": row}
    return answers


@pytest.mark.parametrize("tp_size", [2, 4])
def test_ranks_give_the_answer_of_one(
    checkpoints: Path, one_rank: dict[str, Any], tp_size: int
) -> None:
    answers = values(
        run_ranks(
            "tests.support.rank_scenarios:tiny_models",
            tp_size,
            deadline_s=240.0,
            root=str(checkpoints),
            prompts=PROMPTS,
        )
    )
    for name, expected in one_rank.items():
        for answer in answers:
            assert answer[name]["digest"] == answers[0][name]["digest"], "ranks differ in bits"
            assert answer[name]["tokens"] == expected["tokens"], name
        row = torch.tensor(answers[0][name]["last_row"])
        torch.testing.assert_close(row, expected["last_row"], atol=1e-4, rtol=1e-4)
