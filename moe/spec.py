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

    def why_not(self) -> list[str]:
        """All reasons why no token could be routed so; empty when it can."""
        reasons = []
        if self.num_experts % self.num_groups:
            reasons.append(f"{self.num_experts} experts do not form {self.num_groups} equal groups")
        if self.top_groups > self.num_groups:
            reasons.append(f"{self.top_groups} of {self.num_groups} groups cannot be chosen")
        group_size = self.num_experts // self.num_groups
        if self.top_k > self.top_groups * group_size:
            reasons.append(
                f"{self.top_k} experts per token are more than the "
                f"{self.top_groups * group_size} to choose from"
            )
        if self.num_groups > 1 and self.group_score is GroupScore.TOP2_SUM and group_size < 2:
            reasons.append("groups of one expert have no two best ones")
        return reasons


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeSpec:
    """The mixture part of one decoder layer."""

    gate: GateSpec
    ffn_dim: int
    """Inner width of one routed expert."""
    gated: bool = True
    """Experts and shared MLP are down(act(gate) * up); False: down(act(up)) (DeepSpeed-MoE)."""
    expert_bias: bool = False
    """Linears of experts and shared MLP have biases (GPT-OSS, DeepSpeed-MoE)."""
    glu_limit: float = 0.0
    """Gate and up values are clamped to this size, and the product is (up + 1) * gate *
    sigmoid(alpha * gate) (GPT-OSS); 0: the model's own activation."""
    glu_alpha: float = 1.702
    shared_ffn_dim: int = 0
    """Inner width of the experts that every token visits, fused into one MLP; 0: none."""
    shared_gate: bool = False
    """The shared experts' output is multiplied by a learned sigmoid gate (Qwen2-MoE)."""
    residual: bool = False
    """The shared MLP and the experts are mixed by a learned two-way softmax (PR-MoE,
    DeepSpeed-MoE, arXiv 2201.05596, section 4.1)."""
