"""Models over an expert layout: whole experts in slots, every layer one exchange per step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.dist.communicator import SingleRank
from moe.exchange.base import Arrivals, Exchange
from moe.exchange.local import LocalExchange, LocalPending
from tests.support.stepping import Stepper
from tests.support.tiny_models import prompt_tokens, tiny_configs

Checkpoint = Callable[[str], Path]
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")


class CountingExchange(LocalExchange):
    """Notes the rows of each dispatch and combine."""

    def __init__(self, num_local: int, log: list[tuple[str, int]]) -> None:
        super().__init__(num_local)
        self._log = log

    def dispatch(self, hidden_TD: Any, expert_TK: Any, weight_TK: Any) -> LocalPending:
        self._log.append(("dispatch", len(hidden_TD)))
        return super().dispatch(hidden_TD, expert_TK, weight_TK)

    def combine(self, partial_AD: torch.Tensor, arrivals: Arrivals) -> torch.Tensor:
        assert partial_AD.dtype == torch.float64
        self._log.append(("combine", len(partial_AD)))
        return super().combine(partial_AD, arrivals)


class Backwards:
    """All experts on this rank, in slots of descending order."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self.log: list[tuple[str, int]] = []

    def held(self, layer: int) -> tuple[int, ...]:
        return tuple(reversed(range(self._num_experts)))

    def exchange(self, layer: int) -> Exchange:
        return CountingExchange(self._num_experts, self.log)

    def physical(self, layer: int, expert_TK: torch.Tensor) -> torch.Tensor:
        return self._num_experts - 1 - expert_TK


def _layout(name: str) -> Backwards:
    config = tiny_configs()[name]
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    return Backwards(next(getattr(config, key) for key in keys if hasattr(config, key)))


@pytest.mark.parametrize("name", FAMILIES)
def test_slots_change_no_bit_of_a_models_answer(checkpoint: Checkpoint, name: str) -> None:
    prompt = prompt_tokens(17)
    layout = _layout(name)
    whole = Stepper.load(checkpoint(name), SingleRank(), expert_layout=layout)
    expected = Stepper.load(checkpoint(name)).step({"a": prompt})["a"]
    assert torch.equal(whole.step({"a": prompt})["a"], expected)
    mixtures = len(layout.log) // 2
    assert layout.log == [("dispatch", 17), ("combine", 17)] * mixtures
    layout.log.clear()
    whole.idle()
    assert layout.log == [("dispatch", 0), ("combine", 0)] * mixtures
    assert mixtures > 0


def test_a_dense_model_has_nothing_to_do_in_an_idle_step(checkpoint: Checkpoint) -> None:
    for name in ("llama", "gpt2", "opt"):
        Stepper.load(checkpoint(name)).idle()
