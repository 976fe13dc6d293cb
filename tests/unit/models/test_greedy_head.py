"""Tokens of the compiled head against the largest of the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from replicas.kernels.cpu_ops import CpuKernels
from replicas.layers.weights import ResidentWeights
from replicas.models.greedy_head import GreedyHead
from tests.support.compiled_kernels import threads
from tests.support.stepping import Stepper
from tests.support.tiny_models import prompt_tokens

WIDTH = 70
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Head:
    """A head over `num_rows` rows of a table, of which the first `vocab_size` are tokens."""

    def __init__(self, kernels: CpuKernels, table_VD: torch.Tensor, vocab_size: int) -> None:
        self._kernels, self._vocab_size = kernels, vocab_size
        self._tensors = kernels.pack("lm_head", table_VD)
        self._weights = ResidentWeights({"head": self._tensors})
        self._head = GreedyHead(kernels.library, vocab_size)

    def tokens(self, hidden_RD: torch.Tensor) -> list[int] | None:
        return self._head.tokens(hidden_RD, self._weights)

    def expected(self, hidden_RD: torch.Tensor) -> list[int]:
        logits_RV = self._kernels.linear(hidden_RD, self._tensors, "lm_head", wide=True)
        tokens: list[int] = np.argmax(logits_RV[:, : self._vocab_size].numpy(), axis=-1).tolist()
        return tokens


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@each_dtype
@pytest.mark.parametrize("vocab_size", [1, 17, 200, 1003])
def test_the_largest_logits_token(
    cpu_kernels: CpuKernels, vocab_size: int, dtype: torch.dtype
) -> None:
    head = Head(cpu_kernels, noise(vocab_size, WIDTH, dtype=dtype), vocab_size)
    for num_rows in (1, 2, 4, 5, 16, 17, 40, 100, 300):
        hidden_RD = noise(num_rows, WIDTH, dtype=dtype, seed=num_rows)
        with threads(1 + num_rows % 3):
            assert head.tokens(hidden_RD) == head.expected(hidden_RD)


@each_dtype
def test_the_first_of_equals(cpu_kernels: CpuKernels, dtype: torch.dtype) -> None:
    table_VD = noise(8, WIDTH, dtype=dtype)[torch.arange(1000) % 8]
    head = Head(cpu_kernels, table_VD, 1000)
    hidden_RD = noise(20, WIDTH, dtype=dtype, seed=1)
    for count in (1, 2, 3):
        with threads(count):
            tokens = head.tokens(hidden_RD)
        assert tokens == head.expected(hidden_RD)
        assert tokens is not None
        assert max(tokens) < 8
    assert head.tokens(torch.zeros(3, WIDTH, dtype=dtype)) == [0, 0, 0]


@each_dtype
def test_rows_that_fill_up_the_table_are_no_tokens(
    cpu_kernels: CpuKernels, dtype: torch.dtype
) -> None:
    table_VD = -noise(96, WIDTH, dtype=dtype).abs()
    table_VD[90:] = 0
    head = Head(cpu_kernels, table_VD, 90)
    hidden_RD = noise(3, WIDTH, dtype=dtype, seed=1).abs()
    assert head.tokens(hidden_RD) == head.expected(hidden_RD)


@each_dtype
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_left_to_the_sampler(
    cpu_kernels: CpuKernels, dtype: torch.dtype, poison: float
) -> None:
    head = Head(cpu_kernels, noise(200, WIDTH, dtype=dtype), 200)
    hidden_RD = noise(6, WIDTH, dtype=dtype, seed=1)
    hidden_RD[4, 3] = poison
    assert head.tokens(hidden_RD) is None
    assert head.tokens(hidden_RD[:4]) == head.expected(hidden_RD[:4])


def test_a_part_of_the_vocabulary_says_nothing(cpu_kernels: CpuKernels) -> None:
    head = Head(cpu_kernels, noise(64, WIDTH, dtype=torch.float32), 128)
    assert head.tokens(noise(1, WIDTH, dtype=torch.float32)) is None


def test_weights_that_are_not_packed_say_nothing(cpu_kernels: CpuKernels) -> None:
    weights = ResidentWeights({"head": {"lm_head": noise(64, WIDTH, dtype=torch.float32)}})
    head = GreedyHead(cpu_kernels.library, 64)
    assert head.tokens(noise(1, WIDTH, dtype=torch.float32), weights) is None


@pytest.mark.parametrize(("name", "has_one"), [("qwen3", True), ("opt_350m", False)])
def test_only_where_logits_are_the_heads_product(
    checkpoint: Callable[[str], Path], cpu_kernels: CpuKernels, name: str, has_one: bool
) -> None:
    stepper = Stepper.load(checkpoint(name), dtype="bfloat16")
    logits = stepper.step({"a": prompt_tokens(5)})["a"]
    assert logits.isfinite().all()
    assert (GreedyHead.of(stepper._model) is not None) == has_one
