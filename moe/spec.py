"""What a mixture-of-experts layer is, as data: torch-free, so planner and gateway read it too.

One `GateSpec` describes every router that is served (Mixtral, Qwen2/3-MoE, DeepSeek-V2/V3,
GPT-OSS); `moe/gating.py` computes all of them with one function.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Score(enum.StrEnum):
    """What turns router logits into scores."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    RAW = "raw"
    """Selection on the logits; the weights are a softmax over the chosen ones (GPT-OSS)."""


class GroupScore(enum.StrEnum):
    """How good a group of experts is (group-limited routing)."""

    MAX = "max"
    TOP2_SUM = "top2_sum"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """How a token finds its experts."""

    num_experts: int
    top_k: int
    score: Score = Score.SOFTMAX
    selection_bias: bool = False
    """A correction bias is added to the scores for the choice alone (DeepSeek-V3)."""
    logit_bias: bool = False
    """The router is a linear with bias (GPT-OSS)."""
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = GroupScore.MAX
    normalise: bool = False
    """Chosen weights are divided by their sum."""
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """The mixture part of one decoder layer."""

    gate: GateSpec
    ffn_dim: int
    """Inner width of one routed expert."""
    shared_ffn_dim: int = 0
    """Inner width of the experts that every token visits, fused into one MLP; 0: none."""
    shared_gate: bool = False
    """The shared experts' output is multiplied by a learned sigmoid gate (Qwen2-MoE)."""
    residual: bool = False
    """The shared MLP and the experts are mixed by a learned two-way softmax (PR-MoE,
    DeepSpeed-MoE, arXiv 2201.05596, section 4.1)."""
