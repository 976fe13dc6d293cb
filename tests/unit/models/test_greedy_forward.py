"""Layers, head and choice in one call against the layers and the largest of their logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from replicas.kernels import select
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.loader import PACKED
from replicas.models.greedy_head import Forwarded, GreedyHead
from tests.support.compiled_kernels import lesser_library, threads
from tests.support.stepping import Stepper
from tests.support.tiny_models import prompt_tokens

Checkpoint = Callable[[str], Path]
Work = dict[str, Sequence[int]]
MODELS = ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe_many"]


def forward(
    stepper: Stepper, work: Work, on_computed: Callable[[], None] | None = None
) -> Forwarded:
    head = GreedyHead.of(stepper._model)
    assert head is not None
    batch = stepper.batch(work)
    return head.forward(stepper._model, batch, stepper._weights, stepper._kv, on_computed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("march", ["", "native", "x86-64-v3"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_the_largest_logits_and_hidden_states_the_same_bits(
    checkpoint: Checkpoint,
    cpu_kernels: CpuKernels,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    march: str,
    dtype: str,
) -> None:
    built = lesser_library(march) if march else cpu_kernels.library
    monkeypatch.setattr(select, "_library", lambda _: built)
    merged, plain = (Stepper.load(checkpoint(name), dtype=dtype) for _ in range(2))
    works: list[Work] = [{f"r{index}": prompt_tokens(9 * index + 1, index) for index in range(9)}]
    works += [{f"r{index}": [index + 3] for index in range(count)} for count in (1, 2, 3, 9)]
    signs: list[int] = []
    for turn, work in enumerate(works):
        with threads(1 + turn % 3), torch.inference_mode():
            found = forward(merged, work, lambda: signs.append(1))
            hidden_TD = plain._model.forward(plain.batch(work), plain._weights, plain._kv)
            logits_TV = plain._model.logits(hidden_TD, plain._weights)
        assert torch.equal(found.hidden_TD, hidden_TD), turn
        assert found.tokens == logits_TV.argmax(dim=-1).tolist(), turn
        assert found.head_s > 0
        assert len(signs) == turn + 1


def test_an_error_of_who_is_told_is_raised_behind_the_call(
    checkpoint: Checkpoint, cpu_kernels: CpuKernels
) -> None:
    def fail() -> None:
        raise ConnectionError("gone")

    stepper = Stepper.load(checkpoint("llama"), dtype="bfloat16")
    with pytest.raises(ConnectionError, match="gone"):
        forward(stepper, {"a": [1]}, fail)


def test_logits_that_are_not_finite_are_left_to_the_sampler(
    checkpoint: Checkpoint, cpu_kernels: CpuKernels
) -> None:
    stepper = Stepper.load(checkpoint("llama"), dtype="bfloat16")
    stepper._weights.acquire("head")["lm_head" + PACKED].fill_(float("inf"))
    found = forward(stepper, {"a": [1]})
    assert found.tokens is None
    assert found.hidden_TD.isfinite().all()


def test_weights_that_come_and_go_give_hidden_states_alone(
    checkpoint: Checkpoint, cpu_kernels: CpuKernels
) -> None:
    class Passing:
        """Hands out the units of another provider, as a streaming one does."""

        def __init__(self, stepper: Stepper) -> None:
            self.acquire, self.release = stepper._weights.acquire, stepper._weights.release

    stepper, resident = (Stepper.load(checkpoint("llama"), dtype="bfloat16") for _ in range(2))
    stepper._weights = Passing(stepper)
    signs: list[int] = []
    found = forward(stepper, {"a": [1, 2]}, lambda: signs.append(1))
    assert found.tokens is None
    assert signs == [1]
    assert torch.equal(found.hidden_TD, forward(resident, {"a": [1, 2]}).hidden_TD)
