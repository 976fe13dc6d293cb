"""Picks one token per row of logits, for any mixture of parameters in one batch.

The sampler has no state: a row's token is a function of its logits, parameters, token history and
(seed, choice index, position). It works on whole batches; only features that a row uses cost
anything. A row that cannot be sampled carries its own error and never disturbs the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from replicas.api import TokenLogprob
from replicas.kernels.cpu_draws import WISHES
from replicas.kernels.uploads import on_device
from replicas.sampling.filters import divisors, draw, filtered_probs
from replicas.sampling.logprobs import token_logprobs
from replicas.sampling.params_batch import ParamsBatch
from replicas.sampling.penalties import apply_penalties
from replicas.sampling.ragged import IntArray
from replicas.sampling.row_groups import row_groups

NOT_FINITE = "The model produced logits that are not finite (NaN or infinity)."
NOTHING_LEFT = (
    "Bias, penalties, minimum length and structured output of the request exclude every token."
)
_REASONS = {-1: NOT_FINITE, -2: NOTHING_LEFT}
"""What stands in the place of a token that could not be sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRow:
    """What came of one row: a token (with logprob if asked for) or an error."""

    token_id: int = -1
    logprob: TokenLogprob | None = None
    error: str = ""


class Draws(Protocol):
    """Draws the same tokens as `filters`, faster, and says where it cannot; see `CpuDraws`."""

    def draw(
        self,
        logits_RV: torch.Tensor,
        rows_K: IntArray,
        wishes_K: npt.NDArray[np.void],
    ) -> IntArray:
        """Tokens of some rows; -1 where `filters` has to say."""
        ...


class Sampler:
    """Draws tokens; see the module's docstring.

    Args:
        draws: what draws random tokens of CPU logits; None: torch.
    """

    def __init__(self, draws: Draws | None = None) -> None:
        self._draws = draws

    def sample(self, logits_RV: torch.Tensor, batch: ParamsBatch) -> list[SampledRow]:
        """Pick a token for every row.

        Args:
            logits_RV: raw logits, fp32; not changed.
            batch: parameters and token history, in the order of the rows.

        Returns:
            One entry per row. Greedy rows (temperature 0) get the largest logit, the lowest id
            among equals; other rows invert their cumulative distribution in vocabulary order.
        """
        if not len(batch):
            return []
        try:
            return self._sample_batch(logits_RV, batch)
        except Exception as error:  # the fault boundary of a request
            if len(batch) == 1:
                return [SampledRow(error=f"Sampling failed: {error}")]
        rows = range(len(batch))
        return [self.sample(logits_RV[row : row + 1], batch.row(row))[0] for row in rows]

    def launch(self, logits_RV: torch.Tensor, batch: ParamsBatch) -> torch.Tensor:
        """The same tokens without waiting for them, on the logits' device; see `told`.

        Args:
            logits_RV: raw logits, fp32; not changed.
            batch: one that `defers` is true of.

        Returns:
            (R,) int64; below 0 for a row that cannot be sampled.
        """
        changed_RV = apply_penalties(logits_RV, batch)
        tokens_R, peak_R = self._tokens_and_peaks(changed_RV, batch)
        reason_R = torch.full_like(tokens_R, -1)
        if changed_RV is not logits_RV:
            reason_R = torch.where(logits_RV.amax(dim=-1).isfinite(), -2, reason_R)
        return torch.where(peak_R.isfinite(), tokens_R, reason_R)

    @staticmethod
    def told(tokens_R: IntArray) -> list[SampledRow]:
        """What `launch` gave, when it is on the host."""
        return [
            SampledRow(error=_REASONS[token_id]) if token_id < 0 else SampledRow(token_id=token_id)
            for token_id in tokens_R.tolist()
        ]

    def _sample_batch(self, logits_RV: torch.Tensor, batch: ParamsBatch) -> list[SampledRow]:
        if batch.is_plain_greedy and logits_RV.device.type == "cpu":
            logits = logits_RV.numpy()
            tokens = logits.argmax(axis=-1)
            if np.isfinite(logits[np.arange(len(tokens)), tokens]).all():
                return [SampledRow(token_id=token_id) for token_id in tokens.tolist()]
        changed_RV = apply_penalties(logits_RV, batch)
        tokens_R, peak_R = self._tokens_and_peaks(changed_RV, batch)
        errors = self._errors(logits_RV, changed_RV, peak_R)
        logprobs = self._logprobs(logits_RV, tokens_R, batch, errors)
        return [
            SampledRow(error=errors[row])
            if row in errors
            else SampledRow(token_id=token_id, logprob=logprobs.get(row))
            for row, token_id in enumerate(tokens_R.tolist())
        ]

    def _tokens_and_peaks(
        self, changed_RV: torch.Tensor, batch: ParamsBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's token and largest logit; the token is only good when that is finite."""
        # The maximum shows a NaN, a +inf or a row of nothing but -inf, all in one pass.
        if (batch.column("temperature") > 0.0).any():
            peak_R = changed_RV.amax(dim=-1)
            return self._pick(changed_RV, peak_R, batch), peak_R
        # The same pass finds the tokens; a row's first NaN counts as its largest entry.
        tokens_R = _argmax(changed_RV)
        return tokens_R, changed_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)

    def _pick(
        self, changed_RV: torch.Tensor, peak_R: torch.Tensor, batch: ParamsBatch
    ) -> torch.Tensor:
        random_rows = batch.where(batch.column("temperature") > 0.0)
        if len(random_rows) < len(batch):
            tokens_R = _argmax(changed_RV)
        else:
            tokens_R = torch.empty(len(batch), dtype=torch.int64, device=changed_RV.device)
        if self._draws is not None:
            random_rows = self._draw_compiled(self._draws, changed_RV, peak_R, batch, tokens_R)
        for part in row_groups(changed_RV, len(random_rows)):
            rows = random_rows[part]
            index = on_device(rows, changed_RV.device)
            uniform = on_device(batch.uniforms(rows), changed_RV.device)
            logits_KV = changed_RV.index_select(0, index)
            probs_KV = filtered_probs(logits_KV, peak_R.index_select(0, index), batch, rows)
            tokens_R.index_copy_(0, index, draw(probs_KV, uniform))
        return tokens_R

    def _draw_compiled(
        self,
        draws: Draws,
        changed_RV: torch.Tensor,
        peak_R: torch.Tensor,
        batch: ParamsBatch,
        tokens_R: torch.Tensor,
    ) -> IntArray:
        """Fill in what compiled code can say of the random rows; the rows it leaves to torch."""
        rows = batch.where(batch.column("temperature") > 0.0)
        wishes = np.zeros(len(rows), WISHES)
        wishes["peak"] = peak_R.numpy()[rows]
        wishes["divisor"] = divisors(batch.floats("temperature", rows))
        wishes["top_k"] = batch.ints("top_k", rows)
        wishes["top_p"] = batch.floats("top_p", rows)
        wishes["min_p"] = batch.floats("min_p", rows)
        wishes["uniform"] = batch.uniforms(rows)
        tokens = draws.draw(changed_RV, rows, wishes)
        tokens_R.numpy()[rows] = tokens
        return rows[tokens < 0]

    def _errors(
        self, logits_RV: torch.Tensor, changed_RV: torch.Tensor, peak_R: torch.Tensor
    ) -> dict[int, str]:
        """Row -> reason, for rows without a finite largest logit."""
        finite_R = peak_R.isfinite()
        bad_rows = (~finite_R).nonzero().flatten().tolist()
        if not bad_rows:
            return {}
        raw_finite = logits_RV[bad_rows].amax(dim=-1).isfinite().tolist()
        reasons = [NOTHING_LEFT if finite else NOT_FINITE for finite in raw_finite]
        return dict(zip(bad_rows, reasons, strict=True))

    def _logprobs(
        self,
        logits_RV: torch.Tensor,
        tokens_R: torch.Tensor,
        batch: ParamsBatch,
        errors: dict[int, str],
    ) -> dict[int, TokenLogprob]:
        """Row -> logprob, for the rows that ask and have no error."""
        asked: npt.NDArray[np.bool_] = batch.column("logprobs") >= 0
        asked[list(errors)] = False
        rows = batch.where(asked)
        if not rows.size:
            return {}
        index = on_device(rows, logits_RV.device)
        scored = token_logprobs(logits_RV[index], tokens_R[index], batch.ints("logprobs", rows))
        return dict(zip(rows.tolist(), scored, strict=True))


def _argmax(logits_RV: torch.Tensor) -> torch.Tensor:
    """The first largest entry of each row."""
    if logits_RV.device.type == "cpu":
        # Same result as torch.argmax (first of equals), about ten times as fast on one core.
        return torch.from_numpy(logits_RV.numpy().argmax(axis=-1))
    return logits_RV.argmax(dim=-1)
