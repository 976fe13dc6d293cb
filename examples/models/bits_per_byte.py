"""Bits per byte under one fixed protocol, for any engine that can return log-probabilities.

The text is tokenised without special tokens and cut into consecutive, non-overlapping windows.
Every window is scored on its own behind one start token: nothing is carried from window to window,
and every text token is predicted exactly once. This module knows no framework: it imports neither
torch nor transformers, so the same figure can be recomputed through any server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Window = Sequence[int]
ScoreWindows = Callable[[Sequence[Window]], Sequence[Sequence[float]]]
"""Maps windows to natural-log probabilities: row `w` holds `len(w) - 1` values, the value at `i`
being log p(w[i + 1] | w[: i + 1])."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How text is cut; `window_tokens` counts the start token."""

    window_tokens: int = 512
    start_token_id: int = 0

    def __post_init__(self) -> None:
        if self.window_tokens < 2:
            raise ValueError(f"window_tokens must be at least 2, got {self.window_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a text cost: total bits over `tokens` predicted tokens that spell `num_bytes` bytes."""

    bits: float
    num_bytes: int
    tokens: int
    windows: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte; not a number for an empty text."""
        return self.bits / self.num_bytes if self.num_bytes else math.nan

    def __add__(self, other: Score) -> Score:
        return Score(
            bits=self.bits + other.bits,
            num_bytes=self.num_bytes + other.num_bytes,
            tokens=self.tokens + other.tokens,
            windows=self.windows + other.windows,
        )


def cut_windows(token_ids: Sequence[int], protocol: Protocol) -> list[list[int]]:
    """Cut `token_ids` into windows, each led by the start token; the last one may be shorter."""
    body = protocol.window_tokens - 1
    return [
        [protocol.start_token_id, *token_ids[start : start + body]]
        for start in range(0, len(token_ids), body)
    ]


def byte_lengths(vocabulary: Sequence[str]) -> list[int]:
    """Bytes that each token spells: a byte-level BPE writes one character per byte.

    Args:
        vocabulary: the token strings by id, as `Tokenizer.id_to_token` gives them.
    """
    return [len(token) for token in vocabulary]


def score_text(
    token_ids: Sequence[int],
    token_bytes: Sequence[int],
    score_windows: ScoreWindows,
    protocol: Protocol,
    max_windows: int | None = None,
) -> Score:
    """Score one text, or its first `max_windows` windows.

    Args:
        token_ids: the text, tokenised without special tokens.
        token_bytes: bytes that each token id spells, see `byte_lengths`.
        score_windows: the engine under measurement.
        protocol: how the text is cut.
        max_windows: score only this many windows; None means the whole text.

    Raises:
        ValueError: the engine returned the wrong number of values, or one that is not finite.
    """
    windows = cut_windows(token_ids, protocol)[:max_windows]
    rows = score_windows(windows)
    if len(rows) != len(windows):
        raise ValueError(f"{len(windows)} windows were given, {len(rows)} rows came back")
    nats = 0.0
    for index, (window, row) in enumerate(zip(windows, rows, strict=True)):
        if len(row) != len(window) - 1:
            raise ValueError(f"window {index}: {len(window) - 1} values due, {len(row)} came back")
        nats -= math.fsum(row)
    if not math.isfinite(nats):
        raise ValueError("the engine returned a log-probability that is not finite")
    return Score(
        bits=nats / math.log(2),
        num_bytes=sum(token_bytes[token] for window in windows for token in window[1:]),
        tokens=sum(len(window) - 1 for window in windows),
        windows=len(windows),
    )
