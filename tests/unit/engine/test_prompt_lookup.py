"""What is guessed, from where, and when guessing stops."""

from __future__ import annotations

import random

from engine_settings import engine_settings
from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.prompt_lookup import MIN_ACCURACY, PromptLookup


def lookup(prompt: list[int], **changes: int) -> tuple[PromptLookup, list[int]]:
    tokens = list(prompt)
    ngrams = {"min_ngram": 2, "max_ngram": 4} | changes
    made = PromptLookup(tokens, len(prompt), 1000, **ngrams)
    made.learn()
    return made, tokens


def test_what_followed_the_last_tokens_is_guessed() -> None:
    guess, _ = lookup([1, 2, 3, 4, 5, 9, 1, 2])
    assert guess.draft(8) == (3, 4)
    assert guess.draft(1) == (3,)
    assert guess.draft(0) == ()


def test_the_longest_match_wins_and_the_latest_of_equals() -> None:
    guess, _ = lookup([7, 1, 2, 30, 8, 1, 2, 40, 9, 1, 2, 50, 8, 1, 2])
    assert guess.draft(1) == (40,)
    guess, _ = lookup([1, 2, 30, 1, 2, 40, 5, 1, 2])
    assert guess.draft(1) == (40,)


def test_without_a_match_there_is_no_guess() -> None:
    guess, tokens = lookup([1, 2, 3])
    assert guess.draft(5) == ()
    assert not guess.is_promising
    tokens += [8, 1, 2]
    guess.learn()
    assert guess.draft(1) == (3,)
    assert PromptLookup([], 0, 9, min_ngram=1, max_ngram=1).draft(3) == ()


def test_a_period_is_guessed_further_than_once() -> None:
    guess, tokens = lookup([5, 6, 5, 6])
    for _ in range(30):
        tokens += [5, 6]
        guess.learn()
    assert guess.draft(9) == (5, 6, 5, 6, 5, 6, 5, 6, 5)


def test_drafts_grow_with_success_and_stop_with_failure() -> None:
    prompt = list(range(10, 200))
    guess, tokens = lookup([*prompt, 500, 10, 11])
    lengths = []
    for token in prompt[2:60]:
        lengths.append(len(guess.draft(16)))
        tokens.append(token)
        guess.learn()
    assert lengths[0] == 2
    assert lengths == sorted(lengths)
    assert lengths[-1] == 16
    rng = random.Random(0)
    drafted = []
    for _ in range(400):
        # Nearly every pair of ten tokens was there before, and says nothing of what follows.
        tokens.append(rng.randrange(1000, 1010))
        guess.learn()
        drafted.append(len(guess.draft(16)))
    assert guess.accuracy < MIN_ACCURACY
    assert sum(drafted[200:]) < 20


@engine_settings(max_examples=200)
@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.integers(0, 60),
    st.integers(1, 3),
    st.integers(0, 2),
)
def test_a_guess_follows_an_earlier_occurrence_of_the_last_tokens(
    tokens: list[int], num_prompt: int, min_ngram: int, more: int
) -> None:
    """However the tokens arrive, the first guess is what stood behind the same n-gram before."""
    held: list[int] = tokens[: min(num_prompt, len(tokens))]
    guess = PromptLookup(held, num_prompt, 60, min_ngram=min_ngram, max_ngram=min_ngram + more)
    guess.learn()
    for token in tokens[len(held) :]:
        held.append(token)
        guess.learn()
    draft = guess.draft(4)
    if not draft:
        return
    last = held[len(held) - min_ngram :]
    followers = {
        held[end] for end in range(min_ngram, len(held)) if held[end - min_ngram : end] == last
    }
    assert draft[0] in followers


def test_a_very_long_prompt_is_taken_in_over_several_calls() -> None:
    prompt = [*range(20_000), 5, 6]
    tokens = list(prompt)
    guess = PromptLookup(tokens, len(prompt), 20_100, min_ngram=2, max_ngram=4)
    drafts = []
    for token in (7, 8, 9, 10):
        tokens.append(token)
        guess.learn()
        drafts.append(guess.draft(1))
    assert drafts == [(), (), (10,), (11,)]
