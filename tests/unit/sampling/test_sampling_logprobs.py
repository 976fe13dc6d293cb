"""Logprobs against `torch.log_softmax`, ranks and ties by definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicas.api import SamplingParams
from replicas.sampling.logprobs import token_logprobs
from replicas.sampling.sampler import Sampler
from tests.support.sampling_batches import RowCase, batch_of

VOCAB = 30


@given(seed=st.integers(0, 1000), tied=st.booleans(), num_top=st.integers(0, VOCAB + 5))
def test_values_ranks_and_order(seed: int, tied: bool, num_top: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, VOCAB, generator=generator)
    if tied:
        logits = logits.round()
    tokens = torch.randint(VOCAB, (4,), generator=generator)
    num_tops = [num_top, 0, 3, 1]
    expected = logits.log_softmax(-1)
    for row, scored in enumerate(token_logprobs(logits, tokens, num_tops)):
        token = int(tokens[row])
        assert scored.token_id == token
        assert scored.logprob == pytest.approx(float(expected[row, token]), abs=1e-6)
        assert scored.rank == 1 + sum(value > logits[row, token] for value in logits[row]).item()
        order = sorted(range(VOCAB), key=lambda t: (-float(logits[row, t]), t))
        assert [t for t, _ in scored.top] == order[: num_tops[row]]
        for other, value in scored.top:
            assert value == pytest.approx(float(expected[row, other]), abs=1e-6)


def test_logprobs_are_of_raw_logits() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(
        temperature=0.4, top_k=2, repetition_penalty=1.8, logit_bias=((3, 50.0),), logprobs=4
    )
    silent = SamplingParams(temperature=0.0)
    cases = [RowCase(params=p, prompt=(3, 4)) for p in (params, silent, params)]
    rows = Sampler().sample(logits, batch_of(cases))
    expected = logits.log_softmax(-1)
    assert rows[1].logprob is None
    for row in (0, 2):
        scored = rows[row].logprob
        assert scored is not None
        assert scored.token_id == rows[row].token_id == 3
        assert scored.logprob == pytest.approx(float(expected[row, 3]), abs=1e-6)
        assert [t for t, _ in scored.top] == logits[row].topk(4).indices.tolist()
