"""Changes to logits that depend on a request's own tokens and bias, before temperature.

Order: repetition, presence + frequency, logit bias, no-repeat n-grams, minimum length, grammar.
Everything is computed from the token history at hand, so there are no counts to lose in a
preemption or a migration. Only the logits of tokens concerned are touched, never a dense (R, V)
pass; raw logits are never written (they are still needed for logprobs).
"""

from __future__ import annotations

import numpy as np
import torch

from replicas.kernels.uploads import on_device
from replicas.sampling.params_batch import ParamsBatch
from replicas.sampling.ragged import IntArray


def apply_penalties(logits_RV: torch.Tensor, batch: ParamsBatch) -> torch.Tensor:
    """Logits after every token-dependent change.

    Returns:
        `logits_RV` itself when no row uses such a feature, else a changed copy.
    """
    repetition = batch.where(batch.column("repetition_penalty") != 1.0)
    counting = batch.where(
        (batch.column("presence_penalty") != 0.0) | (batch.column("frequency_penalty") != 0.0)
    )
    biased = batch.where(batch.column("has_logit_bias"))
    ngram = batch.where(batch.column("no_repeat_ngram_size") != 0)
    num_output_R = batch.num_tokens_R - batch.num_prompt_R
    too_short = batch.where(num_output_R < batch.column("min_tokens"))
    bound = batch.where(batch.column("has_grammar"))
    if not any(rows.size for rows in (repetition, counting, biased, ngram, too_short, bound)):
        return logits_RV
    out_RV = logits_RV.clone()
    if repetition.size:
        _penalise_repetition(out_RV, batch, repetition)
    if counting.size:
        _penalise_counts(out_RV, batch, counting)
    if biased.size:
        _add_bias(out_RV, batch, biased)
    if ngram.size:
        banned = [_repeating_tokens(batch, int(row)) for row in ngram]
        _mask(out_RV, ngram, banned)
    if too_short.size:
        _mask(out_RV, too_short, [batch.min_token_ids[int(s)] for s in batch.slots_R[too_short]])
    for row in bound.tolist():
        _keep_to_grammar(out_RV, batch, row)
    return out_RV


def _penalise_repetition(out_RV: torch.Tensor, batch: ParamsBatch, rows: IntArray) -> None:
    """Divide positive and multiply negative logits of tokens in prompt + output.

    Source: CTRL (Keskar et al. 2019, arXiv 1909.05858), as transformers applies it.
    """
    owner, tokens = batch.history(rows, with_prompt=True)
    penalty = _on(batch.floats("repetition_penalty", rows)[owner].astype(np.float32), out_RV)
    index = (_on(rows[owner], out_RV), _on(tokens, out_RV))
    values = out_RV[index]
    # A token that occurs twice is written twice, each time with the same value.
    out_RV[index] = torch.where(values < 0, values * penalty, values / penalty)


def _penalise_counts(out_RV: torch.Tensor, batch: ParamsBatch, rows: IntArray) -> None:
    """Subtract presence + frequency * count for tokens of the output (OpenAI's definition)."""
    owner, tokens = batch.history(rows, with_prompt=False)
    vocab_size = out_RV.shape[-1]
    pairs, counts = np.unique(owner * vocab_size + tokens, return_counts=True)
    owner, tokens = np.divmod(pairs, vocab_size)
    presence = batch.floats("presence_penalty", rows)[owner]
    frequency = batch.floats("frequency_penalty", rows)[owner]
    penalty = (presence + frequency * counts).astype(np.float32)
    index = (_on(rows[owner], out_RV), _on(tokens, out_RV))
    out_RV[index] = out_RV[index] - _on(penalty, out_RV)


def _add_bias(out_RV: torch.Tensor, batch: ParamsBatch, rows: IntArray) -> None:
    entries = [batch.logit_bias[int(slot)] for slot in batch.slots_R[rows]]
    owner = np.repeat(rows, [len(ids) for ids, _ in entries])
    index = (
        _on(owner, out_RV),
        _on(np.concatenate([ids for ids, _ in entries]), out_RV),
    )
    values = _on(np.concatenate([values for _, values in entries]), out_RV)
    out_RV.index_put_(index, values, accumulate=True)


def _keep_to_grammar(out_RV: torch.Tensor, batch: ParamsBatch, row: int) -> None:
    allowed_V = None
    if batch.grammars is not None:
        allowed_V = batch.grammars.allowed(int(batch.slots_R[row]), batch.output_of(row))
    if allowed_V is not None:
        out_RV[row].masked_fill_(_on(~allowed_V, out_RV), -torch.inf)


def _repeating_tokens(batch: ParamsBatch, row: int) -> IntArray:
    """Tokens that would complete an n-gram which prompt + output already hold.

    As transformers' `NoRepeatNGramLogitsProcessor`.
    """
    size = int(batch.ints("no_repeat_ngram_size", np.array([row]))[0])
    tokens = batch.tokens_of(row)
    if len(tokens) < size:
        return np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, size)
    prefix = tokens[len(tokens) - size + 1 :]
    matches = (windows[:, :-1] == prefix).all(axis=1)
    return np.unique(windows[matches, -1]).astype(np.int64)


def _mask(out_RV: torch.Tensor, rows: IntArray, token_ids: list[IntArray]) -> None:
    owner = np.repeat(rows, [len(ids) for ids in token_ids])
    tokens = np.concatenate(token_ids)
    out_RV[_on(owner, out_RV), _on(tokens, out_RV)] = -torch.inf


def _on(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return on_device(array, like.device)
