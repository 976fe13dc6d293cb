"""Guesses a request's next tokens from where its latest ones occurred before.

Texts that quote their prompt (summaries, edits of code, answers over documents) repeat runs of it.
The longest match of the last tokens, the latest of equals, says what may follow; while that comes
true the match goes on, and is only looked for again after a miss. How often it came true lately is
measured on every token, whether it was used as a draft or not, so that drafting can stop and start
again at no cost on the device.

Source: prompt lookup decoding (Saxena, 2023); the index is hash chains in two arrays, as in zlib's
deflate. A token costs O(1) to add and about 12 bytes; a search visits a bounded number of places.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

MIN_ACCURACY = 0.3
"""Below it a guess is not worth a row of a step."""
_FIRST_ACCURACY = 0.5
_GAIN = 1 / 8
_MAX_PLACES = 32
_MAX_LEARNT = 8192
"""Tokens taken in at one time, a few milliseconds: a long prompt takes several steps' answers."""
_NOWHERE = -1


class PromptLookup:
    """The guesses for one request.

    Args:
        token_ids: of the request, prompt and output; grown by their owner, see `learn`.
        num_prompt_tokens: how many of them were not generated.
        max_num_tokens: how many there can be; sizes the index.
        min_ngram, max_ngram: tokens that a match needs, and that a search looks at.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        max_num_tokens: int,
        *,
        min_ngram: int,
        max_ngram: int,
    ) -> None:
        self._token_ids = token_ids
        self._num_prompt_tokens = num_prompt_tokens
        self._min_ngram = min_ngram
        self._max_ngram = max_ngram
        self._num_learnt = 0
        # Twice as many chains as tokens: few chains hold n-grams that only share a hash.
        self._latest = array("i", [_NOWHERE]) * (2 << max_num_tokens.bit_length())
        self._earlier = array("i")
        self._source: int | None = None
        self.accuracy = _FIRST_ACCURACY
        """Share of the latest guesses that came true, exponentially weighted."""

    @property
    def is_promising(self) -> bool:
        """Whether there is a guess, and guesses came true often enough lately."""
        return (
            self._source is not None
            and self.accuracy >= MIN_ACCURACY
            and self._num_learnt == len(self._token_ids)
        )

    def learn(self) -> None:
        """Take in tokens that the request got since the last call; of very many, the first."""
        tokens = self._token_ids
        end = min(len(tokens), self._num_learnt + _MAX_LEARNT)
        for position in range(self._num_learnt, end):
            if self._source is not None and position >= self._num_prompt_tokens:
                hit = tokens[self._source] == tokens[position]
                self.accuracy += _GAIN * (hit - self.accuracy)
                self._source = self._source + 1 if hit else None
            self._index(position + 1)
        self._num_learnt = end

    def draft(self, limit: int) -> tuple[int, ...]:
        """The next tokens, at most `limit`; none when there is no promising guess.

        Not longer than guesses come true in a row: 1 / (1 - accuracy) on average. A match that
        reaches the end of the tokens goes on in the draft itself, so that a text with a period is
        guessed further than one period.
        """
        if self._source is None or not self.is_promising:
            return ()
        run = math.ceil(1 / (1 - min(self.accuracy, 0.999)))
        tokens, end = self._token_ids, len(self._token_ids)
        draft: list[int] = []
        for place in range(self._source, self._source + min(limit, run)):
            draft.append(tokens[place] if place < end else draft[place - end])
        return tuple(draft)

    def _index(self, end: int) -> None:
        """Make the n-gram before `end` findable, and look for it if there is no match to follow.

        `_earlier[end - min_ngram]` is the place before `end` of the same chain.
        """
        start = end - self._min_ngram
        if start < 0:
            return
        chain = hash(tuple(self._token_ids[start:end])) & (len(self._latest) - 1)
        place = self._latest[chain]
        if self._source is None and end >= self._num_prompt_tokens:
            self._source = self._longest(end, place)
        self._earlier.append(place)
        self._latest[chain] = end

    def _longest(self, end: int, place: int) -> int | None:
        """Of the places after the last n-gram, the one with most tokens in common before it."""
        best, longest = None, self._min_ngram - 1
        for _ in range(_MAX_PLACES):
            if place == _NOWHERE:
                break
            length = self._common(end, place)
            if length > longest:
                best, longest = place, length
            if length == self._max_ngram:
                break
            place = self._earlier[place - self._min_ngram]
        return best

    def _common(self, end: int, place: int) -> int:
        """Tokens that are the same before both, at most `max_ngram`."""
        tokens, length = self._token_ids, 0
        longest = min(self._max_ngram, place)
        while length < longest and tokens[place - length - 1] == tokens[end - length - 1]:
            length += 1
        return length
