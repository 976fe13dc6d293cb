"""`config.json` of DeepSpeed-MoE models, PR-MoE among them -> `ArchConfig`; torch-free.

DeepSpeed's own checkpoints are pickled and have no config.json, and no architecture of transformers
has a residual expert. So the format is ours (docs/checkpoints.md): GPT-2's keys and names for all
that is not the mixture, Megatron-DeepSpeed's arguments for the mixture, and the names that
`deepspeed.moe.layer.MoE` gives its parameters.
Source: DeepSpeed-MoE, arXiv 2201.05596, section 4.1.
"""

from __future__ import annotations

import dataclasses

from moe.spec import GateSpec, MoeSpec
from replicas.models.arch import ArchConfig
from replicas.models.config_fields import ConfigFields
from replicas.models.hf_learned import gpt2_from_hf
from replicas.models.hf_mixture import checked_gate, with_mixtures

_STANDARD, _RESIDUAL = "standard", "residual"


def deepspeed_moe_from_hf(fields: ConfigFields) -> ArchConfig:
    """GPT with a mixture in every `expert_interval`-th layer, each with a number of experts."""
    arch = dataclasses.replace(gpt2_from_hf(fields), family="deepspeed_moe")
    counts = _expert_counts(fields, arch.num_layers)
    mixtures = {
        index: _mixture(fields, count, arch.layers[index].ffn_dim)
        for index, count in counts.items()
        if count > 1
    }
    return with_mixtures(arch, mixtures)


def _expert_counts(fields: ConfigFields, num_layers: int) -> dict[int, int]:
    """Experts by layer; one expert is a dense layer."""
    interval = fields.integer("expert_interval", default=2)
    layers = [index for index in range(num_layers) if (index + 1) % interval == 0]
    written = fields.raw("num_experts")
    if not isinstance(written, list):
        return dict.fromkeys(layers, fields.integer("num_experts"))
    counts = fields.integers("num_experts")
    if len(counts) == 1:
        counts *= len(layers)
    if len(counts) != len(layers) or 0 in counts:
        raise fields.wrong(
            "num_experts",
            written,
            f"one positive number, or one for each of the {len(layers)} layers that "
            f"expert_interval {interval} makes mixtures",
        )
    return dict(zip(layers, counts, strict=True))


def _mixture(fields: ConfigFields, num_experts: int, ffn_dim: int) -> MoeSpec:
    kind = fields.text("mlp_type", default=_STANDARD)
    if kind not in (_STANDARD, _RESIDUAL):
        raise fields.wrong("mlp_type", kind, f"{_STANDARD} or {_RESIDUAL}")
    top_k = fields.integer("topk", default=1)
    # DeepSpeed weighs a single expert with its probability, several with their shares of the sum.
    gate = GateSpec(num_experts=num_experts, top_k=top_k, normalise=top_k > 1)
    residual = kind == _RESIDUAL
    return MoeSpec(
        gate=checked_gate(fields, gate, "topk"),
        ffn_dim=ffn_dim,
        gated=False,
        expert_bias=True,
        shared_ffn_dim=ffn_dim if residual else 0,
        residual=residual,
    )
