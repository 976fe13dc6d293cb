"""From logits to the probabilities a token is drawn from, and the draw itself.

Order: temperature, top-k, top-p, min-p (transformers' order). Rows are independent: what a row
keeps depends on that row alone, whatever else is in the batch. Probabilities stay unnormalised
after filtering, because the draw scales its target by their sum. Ties at the top-p boundary go to
the lower token id, ties at the top-k boundary are all kept (as in transformers and vLLM).

On an accelerator nothing here waits for a result: what the CPU computes only where a look at the
numbers says it is needed is computed there for every row.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from replicas.kernels.uploads import on_device
from replicas.sampling.params_batch import ParamsBatch
from replicas.sampling.ragged import IntArray
from replicas.sampling.random import Float64Array

# Top-p looks at this many most likely tokens before it sorts a whole row: sorting 150k floats
# takes about 15 ms on one core, finding the top 1024 about 1 ms.
_TOP_P_CANDIDATES = 1024
_CDF_BLOCK = 512


def filtered_probs(
    logits_RV: torch.Tensor, peak_R: torch.Tensor, batch: ParamsBatch, rows: IntArray
) -> torch.Tensor:
    """Unnormalised probabilities of the sampled rows, zero where a filter removed the token.

    Args:
        logits_RV: fp32 logits of `rows` after penalties, one line per entry of `rows`.
        peak_R: the largest logit of each line, finite.
        rows: rows of `batch`, all with a temperature above zero.

    Returns:
        A new fp32 tensor of the shape of `logits_RV`.
    """
    scaled_RV = _scale(logits_RV, peak_R, batch.floats("temperature", rows))
    top_k = batch.ints("top_k", rows)
    uses_top_k = np.flatnonzero((top_k > 0) & (top_k < logits_RV.shape[-1]))
    if uses_top_k.size:
        _mask_top_k(scaled_RV, uses_top_k, top_k[uses_top_k])
    probs_RV = scaled_RV.softmax(dim=-1)
    top_p = batch.floats("top_p", rows)
    uses_top_p = np.flatnonzero(top_p < 1.0)
    if uses_top_p.size:
        _zero_top_p(probs_RV, uses_top_p, top_p[uses_top_p])
    min_p = batch.floats("min_p", rows)
    uses_min_p = np.flatnonzero(min_p > 0.0)
    if uses_min_p.size:
        _zero_min_p(probs_RV, uses_min_p, min_p[uses_min_p])
    return probs_RV


def draw(probs_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Invert the cumulative distribution in vocabulary order; sums are float64.

    Two levels, because a float64 running sum over a whole vocabulary costs more than the softmax:
    blocks of the vocabulary first, then tokens inside the chosen block.

    Args:
        probs_RV: unnormalised, at least one positive entry per row.
        uniform_R: float64 in [0, 1).

    Returns:
        Token ids (R,), int64; never one of probability zero.
    """
    block_cdf_RM = _block_sums(probs_RV).cumsum(dim=-1)
    target_R1 = (uniform_R * block_cdf_RM[:, -1]).unsqueeze(1)
    block_R1 = torch.searchsorted(block_cdf_RM, target_R1, right=True)
    block_R1 = block_R1.clamp(max=block_cdf_RM.shape[1] - 1)
    before_R1 = block_cdf_RM.gather(1, (block_R1 - 1).clamp(min=0)) * (block_R1 > 0)
    offsets = torch.arange(_CDF_BLOCK, device=probs_RV.device)
    token_ids_RB = (block_R1 * _CDF_BLOCK + offsets).clamp(max=probs_RV.shape[1] - 1)
    # The last block may be short: entries beyond the vocabulary count as zero.
    in_vocab_RB = block_R1 * _CDF_BLOCK + offsets < probs_RV.shape[1]
    probs_RB = probs_RV.gather(1, token_ids_RB).double() * in_vocab_RB
    hits_RB = (before_R1 + probs_RB.cumsum(dim=-1) > target_R1) & (probs_RB > 0)
    local_R1 = hits_RB.byte().argmax(dim=-1, keepdim=True)
    missed_R = ~hits_RB.gather(1, local_R1).squeeze(1)
    tokens_R = token_ids_RB.gather(1, local_R1).squeeze(1)
    # Missed: block sum and running sum round differently, and the target fell behind the block's
    # last positive token (or into a block of zeros at the very end). Then that token is it.
    if not _on_cpu(probs_RV):
        return torch.where(missed_R, _last_positive(probs_RV, block_R1), tokens_R)
    if bool(missed_R.any()):
        tokens_R[missed_R] = _last_positive(probs_RV[missed_R], block_R1[missed_R])
    return tokens_R


def divisors(temperature: Float64Array) -> npt.NDArray[np.float32]:
    """What logits are divided by: no temperature above zero becomes zero."""
    return np.maximum(temperature.astype(np.float32), np.finfo(np.float32).tiny)


def _scale(logits_RV: torch.Tensor, peak_R: torch.Tensor, temperature: np.ndarray) -> torch.Tensor:
    # Peak first: then a tiny temperature drives losers to -inf instead of winners to +inf.
    scaled_RV = logits_RV - peak_R.unsqueeze(1)
    return scaled_RV.div_(on_device(divisors(temperature), logits_RV.device).unsqueeze(1))


def _mask_top_k(scaled_RV: torch.Tensor, rows: IntArray, top_k: IntArray) -> None:
    part_KV = _take(scaled_RV, rows)
    largest_KK = part_KV.topk(int(top_k.max()), dim=-1).values
    last = on_device(top_k - 1, scaled_RV.device).unsqueeze(1)
    part_KV.masked_fill_(part_KV < largest_KK.gather(1, last), -torch.inf)
    _put(scaled_RV, rows, part_KV)


def _zero_top_p(probs_RV: torch.Tensor, rows: IntArray, top_p: np.ndarray) -> None:
    """Keep the smallest set of most likely tokens whose mass reaches top_p (Holtzman 2020)."""
    part_KV = _take(probs_RV, rows)
    top_p_K1 = on_device(top_p, probs_RV.device).unsqueeze(1)
    edge = _edge_by_candidates if _on_cpu(probs_RV) else _edge_by_sorting
    cutoff_K1, num_kept_K = edge(part_KV, top_p_K1)
    dropped_KV = part_KV < cutoff_K1
    if not _on_cpu(probs_RV):
        dropped_KV |= _excess_ties(part_KV, cutoff_K1, num_kept_K)
    else:
        tied_K = part_KV.shape[1] - dropped_KV.count_nonzero(dim=-1) > num_kept_K
        if bool(tied_K.any()):
            ties_SV = _excess_ties(part_KV[tied_K], cutoff_K1[tied_K], num_kept_K[tied_K])
            dropped_KV[tied_K] |= ties_SV
    part_KV.masked_fill_(dropped_KV, 0.0)
    _put(probs_RV, rows, part_KV)


def _edge_by_sorting(
    part_KV: torch.Tensor, top_p_K1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return _nucleus_edge(_sorted(part_KV), top_p_K1)


def _edge_by_candidates(
    part_KV: torch.Tensor, top_p_K1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As by sorting, which is done only for rows where the candidates fall short."""
    vocab_size = part_KV.shape[1]
    candidates_KC = part_KV.topk(min(_TOP_P_CANDIDATES, vocab_size), dim=-1).values
    cutoff_K1, num_kept_K = _nucleus_edge(candidates_KC, top_p_K1)
    if candidates_KC.shape[1] < vocab_size:
        mass_K = candidates_KC.cumsum(dim=-1, dtype=torch.float64)[:, -1]
        short_K = mass_K < top_p_K1.squeeze(1)
        if bool(short_K.any()):
            whole_SV = _sorted(part_KV[short_K])
            cutoff_K1[short_K], num_kept_K[short_K] = _nucleus_edge(whole_SV, top_p_K1[short_K])
    return cutoff_K1, num_kept_K


def _nucleus_edge(
    sorted_KC: torch.Tensor, top_p_K1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest kept probability of each row and how many tokens are kept.

    A token is kept while the mass of the tokens before it is below top_p, so the first always is.
    """
    mass_before_KC = sorted_KC.cumsum(dim=-1, dtype=torch.float64).roll(1, dims=-1)
    mass_before_KC[:, 0] = 0.0
    num_kept_K = (mass_before_KC < top_p_K1).count_nonzero(dim=-1).clamp(min=1)
    return sorted_KC.gather(1, num_kept_K.unsqueeze(1) - 1), num_kept_K


def _excess_ties(
    probs_SV: torch.Tensor, cutoff_S1: torch.Tensor, num_kept_S: torch.Tensor
) -> torch.Tensor:
    """Tokens of exactly the cutoff's probability for which there is no place; last ids first."""
    places_S = num_kept_S - (probs_SV > cutoff_S1).count_nonzero(dim=-1)
    ties_SV = probs_SV == cutoff_S1
    return ties_SV & (ties_SV.cumsum(dim=-1) > places_S.unsqueeze(1))


def _sorted(values_SV: torch.Tensor) -> torch.Tensor:
    """Each row in descending order."""
    if _on_cpu(values_SV):
        # numpy sorts floats with vector instructions: a third of torch's time.
        ascending = np.sort(values_SV.numpy(), axis=-1)
        return torch.from_numpy(ascending[:, ::-1].copy())
    return values_SV.sort(dim=-1, descending=True).values


def _zero_min_p(probs_RV: torch.Tensor, rows: IntArray, min_p: np.ndarray) -> None:
    """Drop tokens less likely than min_p times the most likely (Nguyen 2024, arXiv 2407.01082)."""
    part_KV = _take(probs_RV, rows)
    factor = on_device(min_p.astype(np.float32), probs_RV.device).unsqueeze(1)
    part_KV.masked_fill_(part_KV < part_KV.amax(dim=-1, keepdim=True) * factor, 0.0)
    _put(probs_RV, rows, part_KV)


def _block_sums(probs_RV: torch.Tensor) -> torch.Tensor:
    vocab_size = probs_RV.shape[1]
    whole = vocab_size // _CDF_BLOCK * _CDF_BLOCK
    sums = []
    if whole:
        blocks = probs_RV[:, :whole].view(len(probs_RV), -1, _CDF_BLOCK)
        sums.append(blocks.sum(dim=-1, dtype=torch.float64))
    if whole < vocab_size:
        sums.append(probs_RV[:, whole:].sum(dim=-1, keepdim=True, dtype=torch.float64))
    return torch.cat(sums, dim=1)


def _last_positive(probs_RV: torch.Tensor, block_R1: torch.Tensor) -> torch.Tensor:
    """The last token of positive probability not behind each row's block."""
    ids_V = torch.arange(probs_RV.shape[1], dtype=torch.int32, device=probs_RV.device)
    allowed_RV = (probs_RV > 0) & (ids_V < (block_R1 + 1) * _CDF_BLOCK)
    return (allowed_RV * ids_V).amax(dim=-1).long()


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _take(tensor_RV: torch.Tensor, rows: IntArray) -> torch.Tensor:
    if len(rows) == tensor_RV.shape[0]:
        return tensor_RV
    return tensor_RV.index_select(0, on_device(rows, tensor_RV.device))


def _put(tensor_RV: torch.Tensor, rows: IntArray, part_KV: torch.Tensor) -> None:
    if part_KV is not tensor_RV:
        tensor_RV.index_copy_(0, on_device(rows, tensor_RV.device), part_KV)
