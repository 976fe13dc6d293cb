"""Log-probabilities of tokens under the raw logits, fp32, before penalties and temperature.

Ties between alternatives go to the lower token id, on every device: `torch.topk` promises no
order among equals, so rows in which a tie crosses the edge are sorted stably instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from replicas.api import TokenLogprob
from replicas.kernels.uploads import on_device
from replicas.sampling.ragged import IntArray
from replicas.sampling.row_groups import row_groups


def token_logprobs(
    logits_RV: torch.Tensor, token_ids_R: torch.Tensor, num_top_R: Sequence[int] | IntArray
) -> list[TokenLogprob]:
    """Score one token per row, a few rows at a time.

    Args:
        logits_RV: raw logits, fp32.
        token_ids_R: int64, the token to score in each row.
        num_top_R: how many of the most likely tokens to add, per row.

    Returns:
        R entries; values are NaN when the row's logits are.
    """
    scored = []
    for part in row_groups(logits_RV):
        scored += _score_group(logits_RV[part], token_ids_R[part], num_top_R[part])
    return scored


def _score_group(
    logits_RV: torch.Tensor, token_ids_R: torch.Tensor, num_top_R: Sequence[int] | IntArray
) -> list[TokenLogprob]:
    logprobs_RV = logits_RV.log_softmax(dim=-1)
    chosen_R1 = logprobs_RV.gather(1, token_ids_R.unsqueeze(1))
    chosen_logit_R1 = logits_RV.gather(1, token_ids_R.unsqueeze(1))
    ranks_R = (logits_RV > chosen_logit_R1).count_nonzero(dim=-1) + 1
    num_top = [min(int(num), logits_RV.shape[1]) for num in num_top_R]
    top_ids_RK = _top_ids(logits_RV, max(num_top, default=0))
    top_values_RK = logprobs_RV.gather(1, top_ids_RK).tolist()
    columns = zip(
        token_ids_R.tolist(),
        chosen_R1.squeeze(1).tolist(),
        ranks_R.tolist(),
        top_ids_RK.tolist(),
        top_values_RK,
        num_top,
        strict=True,
    )
    return [
        TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            rank=rank,
            top=tuple(zip(ids[:num], values[:num], strict=True)),
        )
        for token_id, logprob, rank, ids, values, num in columns
    ]


def _top_ids(logits_RV: torch.Tensor, num_top: int) -> torch.Tensor:
    """Ids of the largest logits, (R, num_top), descending, equals in order of id."""
    if num_top == 0:
        return torch.empty((len(logits_RV), 0), dtype=torch.int64, device=logits_RV.device)
    values_RK, ids_RK = logits_RV.topk(num_top, dim=-1)
    order = np.lexsort((ids_RK.cpu().numpy(), -values_RK.cpu().numpy()), axis=-1)
    ids_RK = ids_RK.gather(1, on_device(order, ids_RK.device))
    num_reaching_R = (logits_RV >= values_RK[:, -1:]).count_nonzero(dim=-1)
    tied_R = num_reaching_R > num_top
    if bool(tied_R.any()):
        whole = logits_RV[tied_R].sort(dim=-1, descending=True, stable=True).indices
        ids_RK[tied_R] = whole[:, :num_top]
    return ids_RK
