"""Models of transformers whose layers have different numbers of experts.

transformers does not build them itself. A layer that differs gets a mixture block of transformers
made from a configuration of its own, or, in a GPT-2, a mixture as DeepSpeed-MoE defines it, with
DeepSpeed's names of parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM


class DeepSpeedMoeConfig(GPT2Config):
    """GPT-2's keys and Megatron-DeepSpeed's arguments."""

    model_type = "deepspeed_moe"


class _Mlp(nn.Module):
    """Megatron's ParallelMLP with biases."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(dim, ffn_dim)
        self.dense_4h_to_h = nn.Linear(ffn_dim, dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(hidden), approximate="tanh"))


class _Experts(nn.Module):
    def __init__(self, count: int, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(_Mlp(dim, ffn_dim) for _ in range(count))


class _Gate(nn.Module):
    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.wg = nn.Linear(dim, count, bias=False)


class _Routed(nn.Module):
    """Without capacity: a token's experts by probability, weights as in DeepSpeed's gates."""

    def __init__(self, dim: int, ffn_dim: int, count: int, top_k: int) -> None:
        super().__init__()
        self.gate = _Gate(dim, count)
        self.experts = _Experts(count, dim, ffn_dim)
        self._top_k = top_k

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chosen, ids = self.gate.wg(hidden).softmax(dim=-1).topk(self._top_k, dim=-1)
        if self._top_k > 1:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        outputs = torch.stack([e(hidden) for e in self.experts.deepspeed_experts], dim=-2)
        picked = outputs.gather(-2, ids.unsqueeze(-1).expand(*ids.shape, hidden.shape[-1]))
        return (picked * chosen.unsqueeze(-1)).sum(dim=-2)


class ResidualMoe(nn.Module):
    """`deepspeed.moe.layer.MoE` written out, with and without `use_residual`."""

    def __init__(self, config: PreTrainedConfig, count: int) -> None:
        super().__init__()
        dim, ffn_dim = config.n_embd, config.n_inner
        self.deepspeed_moe = _Routed(dim, ffn_dim, count, config.topk)
        self.residual = config.mlp_type == "residual"
        if self.residual:
            self.mlp = _Mlp(dim, ffn_dim)
            self.coefficient = nn.Linear(dim, 2)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        routed: torch.Tensor = self.deepspeed_moe(hidden)
        if not self.residual:
            return routed
        share = self.coefficient(hidden).softmax(dim=-1)
        return routed * share[..., :1] + self.mlp(hidden) * share[..., 1:]


def deepspeed_moe_configs(gpt2: Mapping[str, Any]) -> dict[str, PreTrainedConfig]:
    """PR-MoE and a plain mixture, by name; with sharp attention, for varied greedy choices."""
    gpt2 = {**gpt2, "scale_attn_weights": False}
    return {
        "pr_moe": DeepSpeedMoeConfig(
            **gpt2,
            n_inner=96,
            num_experts=[4, 1, 6],
            expert_interval=1,
            topk=1,
            mlp_type="residual",
        ),
        "deepspeed_moe_top2": DeepSpeedMoeConfig(
            **gpt2, n_inner=32, num_experts=5, expert_interval=2, topk=2, mlp_type="standard"
        ),
    }


def untrained_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of any configuration of the tests, eager attention."""
    if isinstance(config, DeepSpeedMoeConfig):
        return _deepspeed_moe(config)
    layers = config.to_dict().get("per_layer_config") or {}
    plain = copy.deepcopy(config)
    plain.per_layer_config = None
    model = AutoModelForCausalLM.from_config(plain, attn_implementation="eager")
    for index, changes in layers.items():
        own = copy.deepcopy(plain)
        own.update(changes)
        layer = model.model.layers[int(index)]
        layer.mlp = type(layer.mlp)(own)
    return model


def _deepspeed_moe(config: DeepSpeedMoeConfig) -> PreTrainedModel:
    plain = GPT2Config(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    plain._attn_implementation = "eager"
    model = GPT2LMHeadModel(plain)
    counts, interval = config.num_experts, config.expert_interval
    places = [i for i in range(config.n_layer) if (i + 1) % interval == 0]
    counts = counts if isinstance(counts, list) else [counts] * len(places)
    for index, count in zip(places, counts, strict=True):
        if count > 1:
            model.transformer.h[index].mlp = ResidualMoe(config, count)
    return model
