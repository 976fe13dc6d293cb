"""Hard rows: NaN, infinities, nothing left to choose, ties, extreme temperatures, exceptions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from replicas.api import SamplingParams
from replicas.sampling.filters import draw
from replicas.sampling.sampler import NOT_FINITE, NOTHING_LEFT, Sampler
from tests.support.sampling_batches import RowCase, batch_of

VOCAB = 40


def logits_of(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_row_fails_alone(bad: float, temperature: float) -> None:
    mixed = [
        RowCase(params=SamplingParams(temperature=t, top_p=p, seed=i, logprobs=2))
        for i, (t, p) in enumerate([(0.0, 1.0), (temperature, 0.9), (1.0, 0.8), (0.7, 1.0)])
    ]
    logits = logits_of(4)
    expected = Sampler().sample(logits, batch_of(mixed))
    logits[1, 3] = bad
    rows = Sampler().sample(logits, batch_of(mixed))
    assert rows[1].error == NOT_FINITE
    assert rows[1].token_id == -1
    assert rows[1].logprob is None
    assert [rows[i] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]


def test_rows_that_are_all_plainly_greedy_get_what_they_get_beside_others() -> None:
    plain = RowCase(params=SamplingParams(temperature=0.0))
    asking = RowCase(params=SamplingParams(temperature=0.0, logprobs=1))
    logits = logits_of(5)
    logits[1, [7, 3, 9]] = logits[1].max() + 1  # equals: the first one
    logits[3, 8] = math.nan
    alone = Sampler().sample(logits, batch_of([plain] * 5))
    assert alone == Sampler().sample(logits[[*range(5), 0]], batch_of([plain] * 5 + [asking]))[:5]
    assert alone[1].token_id == 3
    assert alone[3].error == NOT_FINITE
    finite = Sampler().sample(logits[:3], batch_of([plain] * 3))
    assert finite == alone[:3]


def test_row_of_minus_infinity_is_not_finite() -> None:
    logits = logits_of(2)
    logits[0] = -math.inf
    rows = Sampler().sample(logits, batch_of([RowCase(params=SamplingParams())] * 2))
    assert rows[0].error == NOT_FINITE
    assert rows[1].error == ""


def test_request_that_masks_everything_fails_alone() -> None:
    everything = SamplingParams(no_repeat_ngram_size=1)
    cases = [
        RowCase(params=everything, prompt=tuple(range(VOCAB))),
        RowCase(params=SamplingParams(temperature=0.0)),
    ]
    logits = logits_of(2)
    rows = Sampler().sample(logits, batch_of(cases))
    assert rows[0].error == NOTHING_LEFT
    assert rows[1].token_id == int(logits[1].argmax())


def test_exception_of_one_row_stays_with_that_row() -> None:
    cases = [RowCase(params=SamplingParams(temperature=0.0)) for _ in range(3)]
    # A token id beyond the vocabulary, as if validation had been passed by.
    cases[1] = RowCase(params=SamplingParams(logit_bias=((VOCAB + 7, 1.0),)))
    logits = logits_of(3)
    rows = Sampler().sample(logits, batch_of(cases))
    assert rows[1].error.startswith("Sampling failed: ")
    assert rows[0].token_id == int(logits[0].argmax())
    assert rows[2].token_id == int(logits[2].argmax())


def test_raw_logits_are_not_changed() -> None:
    logits = logits_of(1)
    before = logits.clone()
    busy = SamplingParams(
        repetition_penalty=1.3,
        presence_penalty=1.0,
        logit_bias=((3, 5.0),),
        no_repeat_ngram_size=1,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        logprobs=3,
    )
    Sampler().sample(logits, batch_of([RowCase(params=busy, prompt=(1, 2), output=(3,))]))
    assert torch.equal(logits, before)


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, [7, 9, 30]] = 2.0
    logits[1, [39, 38]] = 2.0
    rows = Sampler().sample(logits, batch_of([RowCase(params=SamplingParams(temperature=0.0))] * 3))
    assert [row.token_id for row in rows] == [7, 38, 0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-5])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = 100 * logits_of(4)
    cases = [RowCase(params=SamplingParams(temperature=temperature, seed=s)) for s in range(4)]
    rows = Sampler().sample(logits, batch_of(cases))
    assert [row.token_id for row in rows] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("density", [0.1, 0.0])
@pytest.mark.parametrize("vocab_size", [1, 3, 511, 512, 513, 2000])
def test_draw_never_leaves_the_support(vocab_size: int, density: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    probs = torch.rand(64, vocab_size, generator=generator)
    probs[torch.rand(probs.shape, generator=generator) >= density] = 0.0
    probs[torch.arange(64), torch.randint(vocab_size, (64,), generator=generator)] = 0.5
    # 1.0 is outside the contract: even a target at the very end must find a real token.
    for value in (0.0, 1e-300, 0.5, 1 - 2.0**-53, 1.0):
        tokens = draw(probs, torch.full((64,), value, dtype=torch.float64))
        assert (probs.gather(1, tokens.unsqueeze(1)) > 0).all()
        if value == 0.0:
            assert torch.equal(tokens, (probs > 0).byte().argmax(-1))
        if value >= 1 - 2.0**-53:
            last = probs.shape[1] - 1 - (probs > 0).byte().flip(-1).argmax(-1)
            assert torch.equal(tokens, last)


def test_draw_inverts_the_cumulative_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(200, 1777, generator=generator)
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    cdf = np.cumsum(probs.double().numpy(), axis=-1)
    expected = [
        int(np.searchsorted(line, u * line[-1], side="right"))
        for line, u in zip(cdf, uniform.tolist(), strict=True)
    ]
    assert draw(probs, uniform).tolist() == expected


def test_empty_batch() -> None:
    assert Sampler().sample(torch.empty(0, VOCAB), batch_of([])) == []


def test_settings_that_are_off_change_nothing() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert defaults["temperature"] == 1.0
    logits = logits_of(50)
    plain = [RowCase(params=SamplingParams(seed=s)) for s in range(50)]
    neutral = [
        RowCase(params=SamplingParams(seed=s, top_k=VOCAB, top_p=1.0, min_p=0.0)) for s in range(50)
    ]
    assert Sampler().sample(logits, batch_of(plain)) == Sampler().sample(logits, batch_of(neutral))
