"""Every router: the same experts and weights as transformers' own code, and as a plain rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe.gating import route
from moe.spec import GateSpec, GroupScore, Score

DIM = 24
TOP2 = GroupScore.TOP2_SUM


def _v2(method: str, **groups: Any) -> Any:
    return DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=DIM,
            num_attention_heads=2,
            n_routed_experts=16,
            num_experts_per_tok=3,
            routed_scaling_factor=16.0,
            topk_method=method,
            **groups,
        )
    )


def _v3(*, normalise: bool) -> Any:
    return DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=DIM,
            n_routed_experts=16,
            num_experts_per_tok=5,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            norm_topk_prob=normalise,
        )
    )


def _qwen(kind: Any, config: Any, *, normalise: bool) -> Any:
    return kind(
        config(hidden_size=DIM, num_experts=12, num_experts_per_tok=4, norm_topk_prob=normalise)
    )


V3 = GateSpec(
    num_experts=16,
    top_k=5,
    score=Score.SIGMOID,
    selection_bias=True,
    num_groups=4,
    top_groups=2,
    group_score=TOP2,
    normalise=True,
    scale=2.5,
)
V2 = GateSpec(num_experts=16, top_k=3, scale=16.0)
QWEN = GateSpec(num_experts=12, top_k=4)
ROUTERS: dict[str, tuple[Callable[[], Any], GateSpec]] = {
    "mixtral": (
        lambda: MixtralTopKRouter(MixtralConfig(hidden_size=DIM)),
        GateSpec(num_experts=8, top_k=2, normalise=True),
    ),
    "qwen2": (lambda: _qwen(Qwen2MoeTopKRouter, Qwen2MoeConfig, normalise=False), QWEN),
    "qwen3": (
        lambda: _qwen(Qwen3MoeTopKRouter, Qwen3MoeConfig, normalise=True),
        dataclasses.replace(QWEN, normalise=True),
    ),
    "deepseek_v2_greedy": (lambda: _v2("greedy"), V2),
    "deepseek_v2_groups": (
        lambda: _v2("group_limited_greedy", n_group=8, topk_group=2),
        dataclasses.replace(V2, num_groups=8, top_groups=2),
    ),
    "deepseek_v3": (lambda: _v3(normalise=True), V3),
    "deepseek_v3_raw_weights": (
        lambda: _v3(normalise=False),
        dataclasses.replace(V3, normalise=False),
    ),
    "gpt_oss": (
        lambda: GptOssTopKRouter(
            GptOssConfig(hidden_size=DIM, num_local_experts=16, num_experts_per_tok=4)
        ),
        GateSpec(num_experts=16, top_k=4, score=Score.RAW, logit_bias=True),
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_the_experts_and_weights_of_transformers(name: str) -> None:
    build, spec = ROUTERS[name]
    router = build()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
        hidden_TD = torch.randn(200, DIM, generator=generator)
        logits_TE, weights_TK, ids_TK = router(hidden_TD)
        topk_ids_TK, topk_weights_TK = route(
            logits_TE, spec, getattr(router, "e_score_correction_bias", None)
        )
    theirs = torch.zeros_like(logits_TE).scatter_(1, ids_TK, weights_TK)
    ours = torch.zeros_like(logits_TE).scatter_(1, topk_ids_TK, topk_weights_TK)
    assert torch.equal(ours != 0, theirs != 0)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    if spec.selection_bias:
        plain_ids, _ = route(logits_TE, spec)
        assert not torch.equal(plain_ids, topk_ids_TK), "the bias should matter somewhere"


def _plain_rule(logits: list[float], spec: GateSpec, bias: list[float]) -> list[int]:
    """The choice, expert by expert, as the papers put it; scores in the tensor's own precision."""
    row = torch.tensor(logits)
    if spec.score is Score.SOFTMAX:
        row = row[None].softmax(-1)[0]
    elif spec.score is Score.SIGMOID:
        row = row.sigmoid()
    scores = (row + torch.tensor(bias)).tolist()
    size = spec.num_experts // spec.num_groups
    groups = []
    for group in range(spec.num_groups):
        best = sorted(scores[group * size : (group + 1) * size], reverse=True)
        rank = best[0] if spec.group_score is GroupScore.MAX else _fp32_sum(best[:2])
        groups.append((-rank, group))
    kept = {group for _, group in sorted(groups)[: spec.top_groups]}
    order = sorted(
        (expert for expert in range(spec.num_experts) if expert // size in kept),
        key=lambda expert: (-scores[expert], expert),
    )
    return order[: spec.top_k]


def _fp32_sum(values: list[float]) -> float:
    return float(torch.tensor(values).sum())


@st.composite
def _routings(draw: st.DrawFn) -> tuple[GateSpec, list[list[float]], list[float]]:
    num_groups, size = draw(st.sampled_from([(1, 6), (2, 4), (4, 3), (3, 2)]))
    top_groups = draw(st.integers(1, num_groups))
    spec = GateSpec(
        num_experts=num_groups * size,
        top_k=draw(st.integers(1, top_groups * size)),
        score=draw(st.sampled_from(Score)),
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(GroupScore)),
        normalise=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )
    # Few distinct values: ties everywhere.
    value = st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0])
    row = st.lists(value, min_size=spec.num_experts, max_size=spec.num_experts)
    return spec, draw(st.lists(row, max_size=5)), draw(row)


@given(_routings(), st.booleans())
def test_ties_go_to_the_lowest_expert_whoever_stands_beside_it(
    routing: tuple[GateSpec, list[list[float]], list[float]], with_bias: bool
) -> None:
    spec, rows, bias = routing
    bias_E = torch.tensor(bias) if with_bias else None
    logits_TE = torch.tensor(rows).view(-1, spec.num_experts)
    topk_ids_TK, topk_weights_TK = route(logits_TE, spec, bias_E)
    assert topk_ids_TK.dtype == torch.int64
    assert topk_weights_TK.dtype == torch.float32
    assert topk_ids_TK.shape == topk_weights_TK.shape == (len(rows), spec.top_k)
    for row, logits in enumerate(rows):
        expected = _plain_rule(logits, spec, bias if with_bias else [0.0] * spec.num_experts)
        assert topk_ids_TK[row].tolist() == expected
        alone_ids, alone_weights = route(logits_TE[row : row + 1], spec, bias_E)
        assert torch.equal(alone_ids[0], topk_ids_TK[row])
        assert torch.equal(alone_weights[0], topk_weights_TK[row])
        total = float(topk_weights_TK[row].sum())
        if spec.score is Score.RAW or spec.normalise:
            assert math.isclose(total, spec.scale, rel_tol=1e-5)


def test_scores_that_underflow_do_not_divide_by_zero() -> None:
    spec = dataclasses.replace(V3, selection_bias=False)
    _, weights_TK = route(torch.full((1, 16), -1000.0), spec)
    assert weights_TK.isfinite().all()


def test_impossible_gates_say_why() -> None:
    assert GateSpec(num_experts=8, top_k=2).why_not() == []
    odd = GateSpec(num_experts=10, top_k=6, num_groups=4, top_groups=5, group_score=TOP2)
    assert len(odd.why_not()) == 2
    assert "more than the 3" in GateSpec(num_experts=6, top_k=4, num_groups=2).why_not()[0]
    lonely = GateSpec(num_experts=4, top_k=1, num_groups=4, top_groups=2, group_score=TOP2)
    assert "two best" in lonely.why_not()[0]
