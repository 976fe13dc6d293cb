"""Token scores in the three shapes that OpenAI clients know.

Completions list tokens, logprobs, alternatives and text offsets side by side; chat nests one object
per token with its bytes; prompt logprobs follow vLLM (token id -> logprob, rank, text). A
probability of zero is printed as -9999.0, since JSON has no infinity.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from router.api import TokenScore

LOWEST = -9999.0


class CompletionLogprobs:
    """Builds the completions format; `text_offset` continues from call to call."""

    def __init__(self) -> None:
        self._offset = 0

    def format(self, scores: Sequence[TokenScore]) -> dict[str, Any]:
        """The logprobs object of one chunk or of a whole choice."""
        offsets = []
        for score in scores:
            offsets.append(self._offset)
            self._offset += len(score.text)
        return {
            "tokens": [score.text for score in scores],
            "token_logprobs": [finite(score.logprob) for score in scores],
            "top_logprobs": [_alternatives(score) for score in scores],
            "text_offset": offsets,
        }


def chat_logprobs(scores: Iterable[TokenScore]) -> dict[str, Any]:
    """The logprobs object of a chat choice or chunk."""
    return {"content": [_chat_token(score) for score in scores], "refusal": None}


def prompt_logprobs(scores: Iterable[TokenScore]) -> list[dict[str, Any] | None]:
    """One entry per prompt token; None for the first, which nothing precedes."""
    return [None if score.logprob is None else _prompt_token(score) for score in scores]


def finite(logprob: float | None) -> float | None:
    """A logprob that JSON can hold."""
    return LOWEST if logprob is not None and not math.isfinite(logprob) else logprob


def _alternatives(score: TokenScore) -> dict[str, float | None] | None:
    if score.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for top in score.top:
        # Different tokens can print the same text; the more likely one comes first and stays.
        found.setdefault(top.text, finite(top.logprob))
    found.setdefault(score.text, finite(score.logprob))
    return found


def _chat_token(score: TokenScore) -> dict[str, Any]:
    return {
        "token": score.text,
        "logprob": finite(score.logprob),
        "bytes": _utf8(score.text),
        "top_logprobs": [
            {"token": top.text, "logprob": finite(top.logprob), "bytes": _utf8(top.text)}
            for top in score.top
        ],
    }


def _prompt_token(score: TokenScore) -> dict[str, Any]:
    entries = {
        str(top.token_id): {
            "logprob": finite(top.logprob),
            "rank": rank,
            "decoded_token": top.text,
        }
        for rank, top in enumerate(score.top, start=1)
    }
    entries[str(score.token_id)] = {
        "logprob": finite(score.logprob),
        "rank": score.rank,
        "decoded_token": score.text,
    }
    return entries


def _utf8(text: str) -> list[int] | None:
    """Null for part of a character: its own bytes are not known here."""
    return None if "\ufffd" in text else list(text.encode("utf-8", "replace"))
