"""The exchange of one rank: a permutation of routed pairs, sorted by expert, then by row."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.exchange.local import LocalExchange


@given(st.data())
def test_pairs_are_a_sorted_permutation_with_their_weights(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 9))
    top_k = data.draw(st.integers(1, num_experts))
    rows = data.draw(
        st.lists(
            st.lists(st.integers(0, num_experts - 1), min_size=top_k, max_size=top_k, unique=True),
            max_size=12,
        )
    )
    ids_TK = torch.tensor(rows, dtype=torch.int64).view(-1, top_k)
    weights_TK = torch.arange(ids_TK.numel()).float().view(ids_TK.shape)
    hidden_TD = torch.arange(len(rows) * 2.0).view(-1, 2)
    arrivals = LocalExchange(num_experts).dispatch(hidden_TD, ids_TK, weights_TK).wait()
    pairs = arrivals.pairs()
    offsets = pairs.offsets_L1.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == ids_TK.numel()
    got = [
        (expert, int(pairs.row_M[pair]), float(pairs.weight_M[pair]))
        for expert in range(num_experts)
        for pair in range(offsets[expert], offsets[expert + 1])
    ]
    expected = sorted(
        (expert, row, float(weights_TK[row, k]))
        for row, experts in enumerate(rows)
        for k, expert in enumerate(experts)
    )
    assert got == expected
    assert arrivals.hidden_AD is hidden_TD
    partial = torch.rand(len(rows), 2, dtype=torch.float64)
    assert torch.equal(LocalExchange(num_experts).combine(partial, arrivals), partial.float())
