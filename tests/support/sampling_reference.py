"""The sampler's oracle: plain Python, one request and one token at a time, nothing shared with it.

`reference_sample` also says how far its choice was from another one (`margin`), so that a test
can leave out cases that hang on the last bits of a float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from replicas.api import SamplingParams

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceToken:
    """The token, its support (tokens that could have been drawn) and the margin of the choice."""

    token_id: int
    probs: dict[int, float]
    margin: float


def reference_uniform(seed: int, choice_index: int, position: int) -> float:
    """SplitMix64 by the book, on Python integers."""

    def output(state: int, index: int) -> int:
        z = (state + index * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    request_state = output(seed & _MASK, 1)
    choice_state = output(request_state, choice_index + 1)
    return (output(choice_state, position + 1) >> 11) / (1 << 53)


def reference_logits(
    logits: Sequence[float],
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    eos_token_ids: Sequence[int] = (),
) -> list[float]:
    """Logits after penalties, bias and masks, each operation rounded to fp32."""
    scores = [np.float32(value) for value in logits]
    history = [*prompt, *output]
    if params.repetition_penalty != 1.0:
        factor = np.float32(params.repetition_penalty)
        for token in set(history):
            scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
    for token in set(output):
        penalty = params.presence_penalty + params.frequency_penalty * list(output).count(token)
        scores[token] = scores[token] - np.float32(penalty)
    for token, bias in params.logit_bias:
        scores[token] = scores[token] + np.float32(bias)
    size = params.no_repeat_ngram_size
    if size:
        for start in range(len(history) - size + 1):
            window = history[start : start + size]
            if window[:-1] == history[len(history) - size + 1 :]:
                scores[window[-1]] = np.float32(-math.inf)
    if len(output) < params.min_tokens:
        for token in (*eos_token_ids, *params.stop_token_ids):
            scores[token] = np.float32(-math.inf)
    return [float(score) for score in scores]


def reference_probs(scores: Sequence[float], params: SamplingParams) -> tuple[list[float], float]:
    """Unnormalised probabilities after the filters, and the margin of the closest call."""
    margin = math.inf
    peak = max(scores)
    temperature = float(np.float32(params.temperature))
    scaled = [float(np.float32((score - peak) / temperature)) for score in scores]
    if 0 < params.top_k < len(scaled):
        threshold = sorted(scaled, reverse=True)[params.top_k - 1]
        scaled = [value if value >= threshold else -math.inf for value in scaled]
    weights = [math.exp(value) for value in scaled]
    total = sum(weights)
    probs = [weight / total for weight in weights]
    if params.top_p < 1.0:
        order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
        mass = 0.0
        kept: set[int] = set()
        for token in order:
            margin = min(margin, abs(mass - params.top_p))
            if kept and mass >= params.top_p:
                break
            kept.add(token)
            mass += probs[token]
        probs = [prob if token in kept else 0.0 for token, prob in enumerate(probs)]
    if params.min_p > 0.0:
        threshold = params.min_p * max(probs)
        margin = min(margin, *(abs(p - threshold) for p in probs if p != max(probs)), math.inf)
        probs = [prob if prob >= threshold else 0.0 for prob in probs]
    return probs, margin


def reference_sample(
    logits: Sequence[float],
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    choice_index: int = 0,
    eos_token_ids: Sequence[int] = (),
) -> ReferenceToken | None:
    """The next token, or None when nothing can be chosen."""
    scores = reference_logits(logits, prompt, output, params, eos_token_ids)
    if not math.isfinite(max(scores)):
        return None
    if params.temperature == 0.0:
        token = scores.index(max(scores))
        return ReferenceToken(token_id=token, probs={token: 1.0}, margin=math.inf)
    probs, margin = reference_probs(scores, params)
    position = len(prompt) + len(output)
    target = reference_uniform(params.seed, choice_index, position) * sum(probs)
    running, chosen = 0.0, None
    for token, prob in enumerate(probs):
        running += prob
        if prob > 0.0:
            margin = min(margin, abs(running - target))
            if chosen is None and running > target:
                chosen = token
    support = {token: prob for token, prob in enumerate(probs) if prob > 0.0}
    return ReferenceToken(
        token_id=max(support) if chosen is None else chosen, probs=support, margin=margin
    )
