"""Settled rows: near what they were, on a grid that nothing but the row decides, exact to add."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.exact_sums import BITS, MAX_SHIFT, heaviest, settle

DIM = 9


def rows(seed: int, count: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Products and gate weights of one token; outputs are up to 10^spread apart."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(count, generator=generator)
    scale = 10.0 ** (spread * torch.rand((count, 1), generator=generator))
    outputs = torch.randn((count, DIM), generator=generator) * scale
    return weights[:, None] * outputs, weights


@given(st.integers(0, 2**20), st.integers(1, 8), st.sampled_from([0.0, 2.0, 7.0]))
def test_sums_do_not_depend_on_their_order(seed: int, count: int, spread: float) -> None:
    products, weights = rows(seed, count, spread)
    settled = settle(products, weights, weights.max().expand(count))
    exact = [sum(Fraction(float(v)) for v in column) for column in settled.t()]
    for order in itertools.islice(itertools.permutations(range(count)), 24):
        summed = torch.zeros(DIM, dtype=torch.float64)
        for row in order:
            summed += settled[row]
        assert [Fraction(float(v)) for v in summed] == exact


@given(st.integers(0, 2**20), st.integers(-120, 90))
def test_a_row_moves_by_half_its_grid_at_most(seed: int, power: int) -> None:
    products, weights = rows(seed, 3, 1.0)
    products = products * 2.0**power
    most = heaviest(weights[None, :])
    settled = settle(products, weights, most.expand(3))
    for before, after, weight in zip(products, settled, weights, strict=True):
        lighter = math.frexp(float(most))[1] - math.frexp(float(weight))[1]
        above = math.frexp(float(before.abs().max()))[1]
        grid = 2.0 ** (above - BITS + min(lighter, MAX_SHIFT))
        assert (after.double() - before.double()).abs().max() <= grid / 2
        assert torch.equal((after.double() / grid).round() * grid, after.double())


def test_a_row_is_settled_by_itself() -> None:
    products, weights = rows(1, 6, 3.0)
    most = weights.max().expand(6)
    whole = settle(products, weights, most)
    for row in range(6):
        own = slice(row, row + 1)
        assert torch.equal(settle(products[own], weights[own], most[own])[0], whole[row])
    assert settle(products[:0], weights[:0], most[:0]).shape == (0, DIM)


def test_zeros_stay_and_what_is_no_number_spreads_over_its_row() -> None:
    products = torch.ones(5, DIM)
    products[0] = 0.0
    products[1, 3] = float("nan")
    products[2, 4] = float("inf")
    products[3] = 2.0**-140
    weights = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])
    settled = settle(products, weights, torch.ones(5))
    assert torch.equal(settled[0], torch.zeros(DIM))
    assert settled[1:3].isnan().all()
    assert torch.equal(settled[3:], products[3:])
