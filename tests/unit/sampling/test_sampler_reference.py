"""The batched sampler against the scalar oracle, on random mixtures of parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.api import SamplingParams
from replicas.sampling.sampler import NOTHING_LEFT, SampledRow, Sampler
from tests.support.sampling_batches import RowCase, batch_of
from tests.support.sampling_reference import reference_sample

VOCAB = 24
# Cases that hang on the last bits (a boundary hit exactly) are left out.
SAFE_MARGIN = 1e-5

token = st.integers(0, VOCAB - 1)
tokens = st.lists(token, max_size=12).map(tuple)
choices = st.sampled_from

params = st.builds(
    SamplingParams,
    temperature=choices([0.0, 0.0, 0.3, 1.0, 1.7]),
    top_k=choices([0, 0, 1, 3, 10, VOCAB, 100]),
    top_p=choices([1.0, 1.0, 0.0371, 0.4913, 0.9127]),
    min_p=choices([0.0, 0.0, 0.0513, 0.311, 1.0]),
    repetition_penalty=choices([1.0, 1.0, 0.7, 1.3]),
    presence_penalty=choices([0.0, 0.0, 1.1, -0.6]),
    frequency_penalty=choices([0.0, 0.0, 0.7, -0.4]),
    no_repeat_ngram_size=choices([0, 0, 1, 2, 3]),
    logit_bias=st.one_of(
        st.just(()),
        st.dictionaries(token, st.floats(-100, 100, width=32), max_size=3).map(
            lambda bias: tuple(bias.items())
        ),
    ),
    min_tokens=choices([0, 0, 3]),
    stop_token_ids=st.lists(token, max_size=2, unique=True).map(tuple),
    seed=st.integers(0, 2**64 - 1),
)
cases = st.builds(
    RowCase,
    params=params,
    prompt=tokens.filter(len),
    output=tokens,
    choice_index=st.integers(0, 3),
    eos_token_ids=st.lists(token, max_size=1).map(tuple),
)


def sample(logits: np.ndarray, batch: list[RowCase]) -> list[SampledRow]:
    return Sampler().sample(torch.from_numpy(logits), batch_of(batch))


@settings(max_examples=300)
@given(
    batch=st.lists(cases, min_size=1, max_size=6),
    logits_seed=st.integers(0, 2**32 - 1),
    tied=st.booleans(),
)
def test_same_tokens_as_scalar_reference(
    batch: list[RowCase], logits_seed: int, tied: bool
) -> None:
    rng = np.random.default_rng(logits_seed)
    logits = (3 * rng.standard_normal((len(batch), VOCAB))).astype(np.float32)
    if tied:
        logits = logits.round()
    for row, case, line in zip(sample(logits, batch), batch, logits.tolist(), strict=True):
        expected = reference_sample(
            line, case.prompt, case.output, case.params, case.choice_index, case.eos_token_ids
        )
        if expected is None:
            assert row.error == NOTHING_LEFT
            continue
        assert row.error == ""
        if expected.margin > SAFE_MARGIN:
            assert row.token_id == expected.token_id


@settings(max_examples=60)
@given(batch=st.lists(cases, min_size=2, max_size=8), data=st.data())
def test_batch_order_and_company_do_not_matter(batch: list[RowCase], data: st.DataObject) -> None:
    rng = np.random.default_rng(len(batch))
    # Few distinct values: ties everywhere.
    logits = rng.integers(-3, 4, (len(batch), VOCAB)).astype(np.float32)
    whole = sample(logits, batch)
    order = data.draw(st.permutations(range(len(batch))))
    shuffled = sample(logits[order], [batch[i] for i in order])
    assert shuffled == [whole[i] for i in order]
    for index, case in enumerate(batch):
        assert sample(logits[index : index + 1], [case]) == [whole[index]]


def test_company_does_not_matter_on_a_large_vocabulary() -> None:
    # Beyond the top-p candidates and the blocks of the draw: each row alone, bit for bit.
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((12, 5003)).astype(np.float32)
    settings_of_row = [
        {"top_p": 0.97},
        {"top_p": 0.2},
        {"top_k": 2000, "top_p": 0.95},
        {"temperature": 5.0, "top_p": 0.999},
        {},
        {"min_p": 0.01},
    ]
    batch = [
        RowCase(params=SamplingParams(seed=row, **settings_of_row[row % 6])) for row in range(12)
    ]
    whole = sample(logits, batch)
    for index, case in enumerate(batch):
        assert sample(logits[index : index + 1], [case]) == [whole[index]]
        expected = reference_sample(logits[index].tolist(), (0,), (), case.params)
        assert expected is not None
        if expected.margin > 1e-6:
            assert whole[index].token_id == expected.token_id
    assert len({row.token_id for row in whole}) > 6


@pytest.mark.parametrize(("top_p", "support"), [(0.1, 1), (0.3, 3), (0.62, 7), (0.98, 10)])
def test_top_p_among_equals_keeps_the_lowest_ids(top_p: float, support: int) -> None:
    rows = [RowCase(params=SamplingParams(top_p=top_p, seed=seed)) for seed in range(300)]
    drawn = {row.token_id for row in sample(np.zeros((300, 10), np.float32), rows)}
    assert drawn == set(range(support))


def chi_square_against_reference(case: RowCase, logits: np.ndarray, draws: int) -> float:
    """Draw at many positions in one batch; expected counts from the oracle's support."""
    reference = reference_sample(logits.tolist(), case.prompt, case.output, case.params)
    assert reference is not None
    # Each row stands at another position of the stream.
    spread = [
        RowCase(params=case.params, prompt=case.prompt * (1 + position), output=case.output)
        for position in range(draws)
    ]
    rows = sample(np.tile(logits, (draws, 1)), spread)
    counts = np.bincount([row.token_id for row in rows], minlength=len(logits))
    total = sum(reference.probs.values())
    chi = 0.0
    for token_id, count in enumerate(counts):
        expected = draws * reference.probs.get(token_id, 0.0) / total
        if expected == 0.0:
            assert count == 0, f"token {token_id} is outside the support"
            continue
        chi += (count - expected) ** 2 / expected
    return chi


def test_distribution_of_plain_and_filtered_sampling() -> None:
    logits = np.linspace(-1.0, 1.5, 8).astype(np.float32)
    # At most 7 degrees of freedom: 26 has a probability below 5e-4, and seeds are fixed.
    for number, extra in enumerate(
        ({}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.3})
    ):
        case = RowCase(params=SamplingParams(seed=100 + number, **extra))
        assert chi_square_against_reference(case, logits, 1500) < 26


def test_replaying_prompt_and_output_continues_the_stream() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((1, VOCAB)).astype(np.float32)
    settings_ = SamplingParams(temperature=1.2, seed=9)
    original = RowCase(params=settings_, prompt=(1, 2, 3), output=(4, 5, 6, 7))
    replayed = RowCase(params=settings_, prompt=(1, 2, 3, 4, 5, 6, 7))
    assert sample(logits, [original]) == sample(logits, [replayed])
    others = [
        RowCase(params=SamplingParams(temperature=1.2, seed=seed), prompt=(1,) * length)
        for seed in range(4)
        for length in range(1, 8)
    ]
    drawn = {row.token_id for row in sample(np.repeat(logits, len(others), 0), others)}
    assert len(drawn) > 4


def test_choices_of_one_request_differ() -> None:
    logits = np.zeros((16, 1000), np.float32)
    batch = [RowCase(params=SamplingParams(seed=1), choice_index=choice) for choice in range(16)]
    assert len({row.token_id for row in sample(logits, batch)}) > 12
