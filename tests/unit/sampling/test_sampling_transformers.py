"""Each penalty and filter against the transformers class of the same name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from replicas.api import SamplingParams
from replicas.sampling.filters import filtered_probs
from replicas.sampling.penalties import apply_penalties
from tests.support.sampling_batches import RowCase, batch_of

VOCAB = 3000
PROMPT = (5, 9, 5, 9, 2)
OUTPUT = (7, 5, 9, 7, 5)


def logits_of(seed: int) -> torch.Tensor:
    return 2.5 * torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(seed))


def ours_after_penalties(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    case = RowCase(params=params, prompt=PROMPT, output=OUTPUT, eos_token_ids=(11, 12))
    return apply_penalties(logits, batch_of([case] * len(logits)))


def theirs(processors: list[LogitsProcessor], logits: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor([PROMPT + OUTPUT] * len(logits))
    for processor in processors:
        logits = processor(ids, logits)
    return logits


@pytest.mark.parametrize("penalty", [0.6, 1.25])
def test_repetition_penalty(penalty: float) -> None:
    logits = logits_of(1)
    ours = ours_after_penalties(SamplingParams(repetition_penalty=penalty), logits)
    expected = theirs([RepetitionPenaltyLogitsProcessor(penalty)], logits.clone())
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert not torch.equal(ours, logits)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 11, 12])
def test_no_repeat_ngram(size: int) -> None:
    logits = logits_of(2)
    ours = ours_after_penalties(SamplingParams(no_repeat_ngram_size=size), logits)
    assert torch.equal(ours, theirs([NoRepeatNGramLogitsProcessor(size)], logits.clone()))


@pytest.mark.parametrize(("min_tokens", "masked"), [(5, False), (6, True)])
def test_min_tokens(min_tokens: int, masked: bool) -> None:
    logits = logits_of(3)
    params = SamplingParams(min_tokens=min_tokens, stop_token_ids=(13,))
    ours = ours_after_penalties(params, logits)
    processor = MinNewTokensLengthLogitsProcessor(
        len(PROMPT), min_tokens, torch.tensor([11, 12, 13])
    )
    assert torch.equal(ours, theirs([processor], logits.clone()))
    assert bool(torch.isinf(ours).any()) is masked


def test_counted_penalties_follow_openai() -> None:
    # mu[j] -> mu[j] - c[j] * frequency - (c[j] > 0) * presence, c over the output alone.
    logits = logits_of(4)
    ours = ours_after_penalties(SamplingParams(presence_penalty=0.8, frequency_penalty=0.3), logits)
    counts = torch.zeros(VOCAB)
    for token in OUTPUT:
        counts[token] += 1
    expected = logits - counts * 0.3 - (counts > 0) * 0.8
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_logit_bias_is_added() -> None:
    logits = logits_of(5)
    ours = ours_after_penalties(SamplingParams(logit_bias=((4, 2.5), (2999, -100.0))), logits)
    expected = logits.clone()
    expected[:, 4] += 2.5
    expected[:, 2999] -= 100.0
    assert torch.equal(ours, expected)


def test_no_feature_means_no_copy() -> None:
    logits = logits_of(6)
    assert ours_after_penalties(SamplingParams(top_k=3), logits) is logits


FILTERS: list[tuple[dict[str, float], list[LogitsProcessor]]] = [
    ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
    ({"top_k": 50}, [TopKLogitsWarper(50)]),
    ({"top_k": 2500}, [TopKLogitsWarper(2500)]),
    ({"top_p": 0.3}, [TopPLogitsWarper(0.3)]),
    ({"top_p": 0.9}, [TopPLogitsWarper(0.9)]),
    # Flat enough that 1024 candidates do not hold the mass: the sort of the whole row.
    (
        {"temperature": 8.0, "top_p": 0.95},
        [TemperatureLogitsWarper(8.0), TopPLogitsWarper(0.95)],
    ),
    ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
    (
        {"temperature": 1.4, "top_k": 100, "top_p": 0.8, "min_p": 0.1},
        [
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(100),
            TopPLogitsWarper(0.8),
            MinPLogitsWarper(0.1),
        ],
    ),
]


@pytest.mark.parametrize(("settings", "processors"), FILTERS)
def test_filters(settings: dict[str, float], processors: list[LogitsProcessor]) -> None:
    logits = logits_of(7)
    batch = batch_of([RowCase(params=SamplingParams(**settings))] * len(logits))
    probs = filtered_probs(logits, logits.amax(-1), batch, np.arange(len(logits)))
    probs = probs / probs.sum(-1, keepdim=True)
    expected = theirs(processors, logits.clone()).softmax(-1)
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-7)


def test_filters_of_a_mixed_batch_do_not_meet() -> None:
    logits = logits_of(8)[: len(FILTERS)]
    used = FILTERS[-len(logits) :]
    batch = batch_of([RowCase(params=SamplingParams(**settings)) for settings, _ in used])
    probs = filtered_probs(logits, logits.amax(-1), batch, np.arange(len(logits)))
    for row, (_, processors) in enumerate(used):
        expected = theirs(processors, logits[row : row + 1].clone()).softmax(-1)[0]
        assert torch.equal(probs[row] > 0, expected > 0)
