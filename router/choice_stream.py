"""One choice of a generation, from engine deltas to pieces of text.

Owns the choice's detokenizer, its stop strings and its token log. Where stop strings are asked for,
tokens are taken one by one, so that what a client gets does not depend on how the engine's steps or
a slow network grouped them. A stop token is counted and listed, but its text is not printed
unless the client asked for stops in the output.
"""

from __future__ import annotations

from collections.abc import Sequence

from replicas.api import FinishReason, GenerationDelta, TokenLogprob
from replicas.text.detokenizer import IncrementalDetokenizer
from replicas.text.stop_strings import StopMatcher
from replicas.text.tokenizer import Tokenizer
from router.api import Piece, TokenScore, TopToken, Usage
from router.sampling_fields import TextOptions


class ChoiceStream:
    """Text side of one choice; `push` deltas, then `take` what they became."""

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        options: TextOptions,
    ) -> None:
        self.index = index
        self.token_log: list[int] = []
        """Every token id of the choice so far; its length is what usage counts."""
        self.finish_reason: FinishReason | None = None
        self.num_cached_tokens = 0
        self._tokenizer = tokenizer
        self._first_prompt_id = prompt_ids[0]
        self._options = options
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_ids, options.skip_special_tokens
        )
        self._matcher = (
            StopMatcher(options.stop, options.include_stop_in_output) if options.stop else None
        )
        self._stop_reason = ""
        self._text = ""
        self._scores: list[TokenScore] = []
        self._prompt_scores: list[TokenScore] = []
        self._num_taken = 0

    def push(self, delta: GenerationDelta) -> bool:
        """Add a delta; True when a stop string ended the choice, which the engine cannot know."""
        if delta.num_cached_tokens:
            self.num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs:
            self._score_prompt(delta.prompt_logprobs)
        stopped = self._push_tokens(delta)
        if not stopped and delta.finish_reason is not None:
            self._finish(delta)
        return stopped

    def take(self, usage: Usage | None = None) -> Piece | None:
        """What was added since the last call; None when that is nothing a client could use."""
        token_ids = tuple(self.token_log[self._num_taken :])
        if not (token_ids or self._text or self._prompt_scores or self.finish_reason or usage):
            return None
        piece = Piece(
            index=self.index,
            text=self._text,
            token_ids=token_ids,
            logprobs=tuple(self._scores),
            prompt_logprobs=tuple(self._prompt_scores),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            usage=usage,
        )
        self._num_taken = len(self.token_log)
        self._text = ""
        if self._scores:
            self._scores = []
        if self._prompt_scores:
            self._prompt_scores = []
        return piece

    def _push_tokens(self, delta: GenerationDelta) -> bool:
        token_ids = delta.token_ids
        printed = token_ids
        if delta.stop_token_id is not None and not self._options.include_stop_in_output:
            printed = token_ids[:-1]
        if self._matcher is None:
            self.token_log += token_ids
            self._score(delta.logprobs)
            if printed:
                self._text += self._detokenizer.push(printed)
            return False
        for at, token_id in enumerate(token_ids):
            self.token_log.append(token_id)
            self._score(delta.logprobs[at : at + 1])
            text = self._detokenizer.push((token_id,)) if at < len(printed) else ""
            if len(self.token_log) <= self._options.min_tokens:
                self._text += text
            elif self._match(self._matcher, text):
                return True
        return False

    def _match(self, matcher: StopMatcher, text: str) -> bool:
        shown, stop = matcher.push(text)
        self._text += shown
        if stop is None:
            return False
        self.finish_reason = FinishReason.STOP
        self._stop_reason = stop
        return True

    def _finish(self, delta: GenerationDelta) -> None:
        rest = self._detokenizer.flush()
        if self._matcher is None:
            self._text += rest
        elif self._match(self._matcher, rest):
            return
        else:
            self._text += self._matcher.flush()
        self.finish_reason = delta.finish_reason
        if delta.stop_token_id is not None:
            self._stop_reason = self._tokenizer.token_text(delta.stop_token_id)

    def _score(self, logprobs: Sequence[TokenLogprob]) -> None:
        for entry in logprobs:
            self._scores.append(token_score(self._tokenizer, entry))

    def _score_prompt(self, logprobs: Sequence[TokenLogprob | None]) -> None:
        for entry in logprobs:
            self._prompt_scores.append(
                token_score(self._tokenizer, entry)
                if entry is not None
                else unscored(self._tokenizer, self._first_prompt_id)
            )


def unscored(tokenizer: Tokenizer, token_id: int) -> TokenScore:
    """The first prompt token: nothing precedes it, so it has no logprob."""
    return TokenScore(token_id=token_id, text=tokenizer.token_text(token_id), logprob=None)


def token_score(tokenizer: Tokenizer, entry: TokenLogprob) -> TokenScore:
    """A logprob as shown to clients, with the texts of its tokens."""
    return TokenScore(
        token_id=entry.token_id,
        text=tokenizer.token_text(entry.token_id),
        logprob=entry.logprob,
        rank=entry.rank,
        top=tuple(
            TopToken(token_id=token_id, logprob=logprob, text=tokenizer.token_text(token_id))
            for token_id, logprob in entry.top
        ),
    )
