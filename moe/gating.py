"""From router logits to the experts of each token: one pure function for every router served.

Scores and weights are fp32. A tie goes to the lowest expert id (and the lowest group), so ids are a
function of a row's own logits, whatever stands beside it and whichever device computes them.
"""

from __future__ import annotations

import torch

from moe.spec import GateSpec, GroupScore, Score

_TINY = 1e-20  # DeepSeek-V3's guard: all scores of a token may underflow


def route(
    logits_TE: torch.Tensor, spec: GateSpec, bias_E: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of every token.

    Args:
        logits_TE: the router's output; widened to fp32.
        bias_E: correction bias, for specs with `selection_bias`.

    Returns:
        topk_ids_TK (int64, distinct in a row, best first) and topk_weights_TK (fp32).

    Sources: Mixtral (arXiv 2401.04088, section 2.1), DeepSeek-V2 (2405.04434, section 2.2.2:
    groups ranked by their best expert), DeepSeek-V3 (2412.19437, section 2.1.2: sigmoid scores, a
    bias in the choice alone, groups ranked by their two best).
    """
    logits_TE = logits_TE.float()
    scores_TE = _scores(logits_TE, spec.score)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if spec.num_groups > 1:
        choice_TE = _within_best_groups(choice_TE, spec)
    topk_ids_TK = _largest(choice_TE, spec.top_k)
    topk_weights_TK = scores_TE.gather(1, topk_ids_TK)
    if spec.score is Score.RAW:
        topk_weights_TK = topk_weights_TK.softmax(dim=-1)
    if spec.normalise:
        topk_weights_TK = topk_weights_TK / (topk_weights_TK.sum(dim=-1, keepdim=True) + _TINY)
    if spec.scale != 1.0:
        topk_weights_TK = topk_weights_TK * spec.scale
    return topk_ids_TK, topk_weights_TK


def exact_sigmoid(logits: torch.Tensor) -> torch.Tensor:
    """The logistic function in fp32, by way of fp64.

    torch's own differs in the last bit between the body of a tensor and its last few elements: a
    token's weights would depend on how many stand behind it.
    """
    return logits.double().sigmoid().float()


def _scores(logits_TE: torch.Tensor, score: Score) -> torch.Tensor:
    if score is Score.SOFTMAX:
        return logits_TE.softmax(dim=-1)
    return exact_sigmoid(logits_TE) if score is Score.SIGMOID else logits_TE


def _within_best_groups(choice_TE: torch.Tensor, spec: GateSpec) -> torch.Tensor:
    """The scores, with minus infinity outside each token's best groups."""
    grouped = choice_TE.view(-1, spec.num_groups, spec.num_experts // spec.num_groups)
    if spec.group_score is GroupScore.MAX:
        group_scores = grouped.amax(dim=-1)
    else:
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, _largest(group_scores, spec.top_groups), value=True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)


def _largest(scores_TN: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of the `count` largest values of each row, in descending order; ties: lowest first.

    `topk` is several times faster than a stable sort but leaves ties to chance. With one value
    more than needed it shows whether there are any; on a device that look would be a sync.
    """
    if count < scores_TN.shape[1] and scores_TN.device.type == "cpu":
        values, columns = scores_TN.topk(count + 1, dim=-1)
        if bool((values[:, :-1] > values[:, 1:]).all()):
            return columns[:, :count]
    _, columns = scores_TN.sort(dim=-1, descending=True, stable=True)
    return columns[:, :count]
