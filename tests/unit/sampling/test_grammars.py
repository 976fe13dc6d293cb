"""Masks of grammars against the language itself: a token may come where its text may."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llguidance import LLMatcher

from replicas.api import SamplingParams
from replicas.sampling.grammars import Grammars
from replicas.sampling.params_batch import ParamsTable
from replicas.sampling.sampler import NOTHING_LEFT, Sampler
from replicas.text.tokenizer import Tokenizer
from tests.support.sampling_batches import RowCase, batch_of

MODEL = Path(__file__).parents[3] / "examples" / "models" / "demo-dense"
VOCAB = 2048
EOS = (0, 2)
WORDS = ("return None", "return self", "returned", "raise", "é")
ANY_WORD = LLMatcher.grammar_from_regex("|".join(WORDS))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_directory(MODEL)


@pytest.fixture
def grammars() -> Grammars:
    return Grammars(lambda: (MODEL / "tokenizer.json").read_text(), VOCAB)


def spelled(tokenizer: Tokenizer, output: list[int]) -> bytes:
    assert tokenizer.token_bytes is not None
    return b"".join(tokenizer.token_bytes.table[token] for token in output)


def expected(tokenizer: Tokenizer, output: list[int]) -> set[int]:
    """Tokens after which the text is still the beginning of a word; the end after a whole one."""
    words = [word.encode() for word in WORDS]
    said = spelled(tokenizer, output)
    ordinary = set(range(VOCAB)) - tokenizer.special_ids
    going_on = {
        token
        for token in ordinary
        if (text := spelled(tokenizer, [token])) and any(w.startswith(said + text) for w in words)
    }
    return going_on | (set(EOS) if said in words else set())


def ids_of(mask: np.ndarray | None) -> set[int]:
    assert mask is not None
    return set(np.flatnonzero(mask).tolist())


def test_a_token_is_allowed_where_its_text_goes_on_with_the_language(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    """Where the text goes on in one way only, some of its tokens are enough."""
    grammars.put(7, ANY_WORD, EOS)
    seen: set[tuple[int, ...]] = set()
    words = set()
    todo: list[list[int]] = [[]]
    while todo:
        output = todo.pop()
        allowed = ids_of(grammars.allowed(7, output))
        possible = expected(tokenizer, output)
        assert allowed, output
        assert allowed <= possible, output
        if len({spelled(tokenizer, [token])[:1] for token in possible}) > 1:
            assert allowed == possible, output
        if allowed & set(EOS):
            words.add(spelled(tokenizer, output).decode())
        for token in allowed - set(EOS):
            longer = [*output, token]
            if tuple(longer) not in seen:
                seen.add(tuple(longer))
                todo.append(longer)
    assert words == set(WORDS)
    assert len(seen) > 50


def test_the_answer_depends_on_the_output_alone_whatever_was_asked_before(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    word = tokenizer.encode("return None", add_special_tokens=False)
    outputs = [word[:at] for at in range(len(word) + 1)]
    for slot, order in enumerate((outputs, outputs[::-1], [outputs[-1], [], outputs[1], []])):
        grammars.put(slot, ANY_WORD, EOS)
        for output in order:
            fresh = Grammars(lambda: (MODEL / "tokenizer.json").read_text(), VOCAB)
            fresh.put(0, ANY_WORD, EOS)
            assert ids_of(grammars.allowed(slot, output)) == ids_of(fresh.allowed(0, output))


def test_what_the_grammar_does_not_allow_has_no_answer_and_does_no_harm(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    grammars.put(0, ANY_WORD, EOS)
    whole = tokenizer.encode("raise", add_special_tokens=False)
    wrong = tokenizer.encode("class", add_special_tokens=False)
    for output in (wrong, [*whole, EOS[0]], [*whole, EOS[0], 5], [*whole, *wrong]):
        assert grammars.allowed(0, output) is None
        assert ids_of(grammars.allowed(0, whole)) == set(EOS)


def test_what_is_no_grammar_and_what_has_no_end_is_refused(grammars: Grammars) -> None:
    with pytest.raises(ValueError, match="grammar"):
        grammars.put(0, "nonsense", EOS)
    with pytest.raises(ValueError, match="eos_token"):
        grammars.put(0, ANY_WORD, ())


def test_only_rows_with_a_grammar_are_masked(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammars.put(2, ANY_WORD, EOS)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(1))
    greedy = SamplingParams(temperature=0.0)
    batch = batch_of(
        [RowCase(params=SamplingParams(temperature=0.0, grammar=ANY_WORD)), RowCase(params=greedy)],
        grammars,
    )
    bound, free = Sampler().sample(logits, batch)
    allowed = sorted(expected(tokenizer, []))
    assert bound.token_id == allowed[int(logits[0, allowed].argmax())]
    assert free.token_id == int(logits[1].argmax())


def test_a_bias_against_all_that_may_come_fails_that_row_alone(grammars: Grammars) -> None:
    grammars.put(2, LLMatcher.grammar_from_regex("a"), EOS)
    (only,) = ids_of(grammars.allowed(2, []))
    against = ((only, float("-inf")),)
    cases = [
        RowCase(params=SamplingParams(temperature=0.0, grammar="a", logit_bias=against)),
        RowCase(params=SamplingParams(temperature=0.0)),
    ]
    bound, free = Sampler().sample(torch.zeros(2, VOCAB), batch_of(cases, grammars))
    assert bound.error == NOTHING_LEFT
    assert free.error == ""


def test_a_row_with_a_grammar_waits_for_the_tokens_before() -> None:
    table = ParamsTable(2)
    table.put(0, SamplingParams(temperature=0.0), 0, ())
    table.put(1, SamplingParams(temperature=0.0, grammar=ANY_WORD), 0, ())
    assert table.defers(np.array([0]))
    assert not table.defers(np.array([0, 1]))
