"""Compiled draws: the very tokens of the torch functions, or a row that is left to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.base.errors import InternalError
from replicas.api import SamplingParams
from replicas.kernels.cpu_draws import WISHES, CpuDraws
from replicas.kernels.cpu_ops import CpuKernels
from replicas.sampling.ragged import IntArray
from replicas.sampling.sampler import Sampler
from tests.support.compiled_kernels import threads
from tests.support.sampling_batches import RowCase, batch_of

choices = st.sampled_from


class Counting:
    """Hands on, and counts rows and those left to torch."""

    def __init__(self, draws: CpuDraws) -> None:
        self._draws = draws
        self.num_rows = self.num_unsure = 0

    def draw(self, logits_RV: torch.Tensor, rows_K: IntArray, wishes_K: np.ndarray) -> IntArray:
        """See `Draws`."""
        tokens_K = self._draws.draw(logits_RV, rows_K, wishes_K)
        self.num_rows += len(tokens_K)
        self.num_unsure += int((tokens_K < 0).sum())
        return tokens_K


params = st.builds(
    SamplingParams,
    temperature=choices([0.0, 0.01, 0.3, 1.0, 1.7, 30.0]),
    top_k=choices([0, 0, 1, 2, 50, 700, 10**6]),
    top_p=choices([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
    min_p=choices([0.0, 0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=choices([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=150)
@given(
    batch=st.lists(st.builds(RowCase, params=params), min_size=1, max_size=6),
    vocab_size=choices([1, 2, 15, 16, 17, 511, 512, 513, 2500]),
    seed=st.integers(0, 2**32 - 1),
    shape=choices(["plain", "tied", "flat", "steep", "masked"]),
)
def test_same_tokens_as_torch(
    cpu_kernels: CpuKernels, batch: list[RowCase], vocab_size: int, seed: int, shape: str
) -> None:
    values = np.random.default_rng(seed).standard_normal((len(batch), vocab_size))
    scale = {"flat": 1e-3, "steep": 40.0}.get(shape, 3.0)
    logits = torch.from_numpy((scale * values).astype(np.float32))
    if shape == "tied":
        logits = logits.round()
    if shape == "masked":
        logits[:, 1::3] = -math.inf
    expected = Sampler().sample(logits, batch_of(batch))
    with threads(1 + seed % 3):
        assert Sampler(CpuDraws(cpu_kernels.library)).sample(logits, batch_of(batch)) == expected


def test_few_rows_of_language_are_left_to_torch(cpu_kernels: CpuKernels) -> None:
    counting = Counting(CpuDraws(cpu_kernels.library))
    generator = torch.Generator().manual_seed(3)
    by_rank = -1.5 * torch.arange(1, 32_001).log()  # Zipf's law, a little steeper
    for turn in range(12):
        order = torch.randperm(32_000, generator=generator)
        logits = by_rank[order] + 0.5 * torch.randn(32, 32_000, generator=generator)
        batch = [
            RowCase(
                params=SamplingParams(
                    temperature=(0.6, 1.0)[row % 2],
                    top_k=(0, 40)[row // 2 % 2],
                    top_p=(1.0, 0.95)[row // 4 % 2],
                    min_p=(0.0, 0.05)[row // 8 % 2],
                    seed=100 * turn + row,
                )
            )
            for row in range(32)
        ]
        expected = Sampler().sample(logits, batch_of(batch))
        assert Sampler(counting).sample(logits, batch_of(batch)) == expected
    assert counting.num_rows == 12 * 32
    assert counting.num_unsure <= counting.num_rows // 20


def test_rows_of_one_batch_do_not_touch_each_other(cpu_kernels: CpuKernels) -> None:
    draws = CpuDraws(cpu_kernels.library)
    wide = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    logits = wide[:, :257]  # rows that lie further apart than they are long
    logits[2, 5] = math.nan
    wishes = np.zeros(5, WISHES)
    wishes["peak"] = logits.amax(dim=-1).numpy()
    wishes["divisor"], wishes["top_p"], wishes["top_k"] = 0.8, 0.9, 30
    wishes["uniform"] = np.linspace(0.1, 0.9, 5)
    rows = np.arange(5)
    together = draws.draw(logits, rows, wishes)
    assert together[2] == -1
    assert (np.delete(together, 2) >= 0).all()
    for row in range(5):
        assert draws.draw(logits, rows[row : row + 1], wishes[row : row + 1])[0] == together[row]


def test_wrong_arrays_are_refused(cpu_kernels: CpuKernels) -> None:
    draws, logits = CpuDraws(cpu_kernels.library), torch.zeros(2, 8)
    with pytest.raises(InternalError, match="drawn from"):
        draws.draw(logits, np.array([2]), np.zeros(1, WISHES))
    with pytest.raises(InternalError, match="drawn from"):
        draws.draw(logits, np.array([0, 1]), np.zeros(1, WISHES))
    with pytest.raises(InternalError, match="drawn from"):
        draws.draw(logits.double(), np.array([0]), np.zeros(1, WISHES))
