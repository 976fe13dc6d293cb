"""`config.json` of mixtures of Llama's shape (Mixtral, Qwen2/3-MoE, GPT-OSS); torch-free.

Defaults are those of transformers' configuration classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from moe.spec import GateSpec, MoeSpec, Score
from replicas.models.arch import ArchConfig
from replicas.models.config_fields import ConfigFields
from replicas.models.hf_llama import qwen_windows, rope_family

_PER_LAYER_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "experts_per_token",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_group",
    "topk_group",
)
"""What transformers' `per_layer_config` may say of a mixture layer."""


def layer_mixtures(
    fields: ConfigFields, layers: Iterable[int], build: Callable[[ConfigFields], MoeSpec]
) -> dict[int, MoeSpec]:
    """The mixture of each of these layers; they may differ in experts (`per_layer_config`).

    Raises:
        ConfigError: a layer differs in something that may not, or cannot be routed.
    """
    named = range(fields.integer("num_hidden_layers"))
    own = {index: fields.of_layer(index, _PER_LAYER_KEYS) for index in named}
    return {index: build(own[index]) for index in layers}


def checked_gate(
    fields: ConfigFields, gate: GateSpec, key: str = "num_experts_per_tok"
) -> GateSpec:
    """The gate, if tokens can be routed so.

    Args:
        key: what to name in the error.

    Raises:
        ConfigError: it asks for more experts than there are, or for groups that do not work out.
    """
    if reasons := gate.why_not():
        raise fields.wrong(key, fields.raw(key), f"possible: {'; '.join(reasons)}")
    return gate


def mixtral_from_hf(fields: ConfigFields) -> ArchConfig:
    """MixtralForCausalLM; every layer a mixture, one sliding window for all or none."""
    window = fields.optional_integer("sliding_window")
    arch = rope_family(fields, "mixtral", [window] * fields.integer("num_hidden_layers"))
    return with_mixtures(arch, layer_mixtures(fields, range(arch.num_layers), _mixtral))


def _mixtral(fields: ConfigFields) -> MoeSpec:
    gate = GateSpec(
        num_experts=fields.integer("num_local_experts", "num_experts", default=8),
        top_k=fields.integer("num_experts_per_tok", default=2),
        normalise=True,
    )
    return MoeSpec(gate=checked_gate(fields, gate), ffn_dim=fields.integer("intermediate_size"))


def qwen2_moe_from_hf(fields: ConfigFields) -> ArchConfig:
    """Qwen2MoeForCausalLM; a gated shared expert beside the routed ones."""
    arch = rope_family(fields, "qwen2_moe", _qwen2_moe_windows(fields))
    arch = dataclasses.replace(arch, attention_bias=fields.flag("qkv_bias", default=True))
    return with_mixtures(arch, layer_mixtures(fields, _qwen_mixture_layers(fields), _qwen2_moe))


def _qwen2_moe(fields: ConfigFields) -> MoeSpec:
    shared = fields.integer("shared_expert_intermediate_size", default=5632, minimum=0)
    return MoeSpec(
        gate=_qwen_gate(fields, num_experts=60, top_k=4),
        ffn_dim=fields.integer("moe_intermediate_size", default=1408),
        shared_ffn_dim=shared,
        shared_gate=shared > 0,
    )


def qwen3_moe_from_hf(fields: ConfigFields) -> ArchConfig:
    """Qwen3MoeForCausalLM; norms over heads, one sliding window for all layers or none."""
    window = None
    if fields.flag("use_sliding_window", default=False):
        present = "sliding_window" in fields
        window = fields.optional_integer("sliding_window") if present else 4096
    arch = rope_family(fields, "qwen3_moe", [window] * fields.integer("num_hidden_layers"))
    bias = fields.flag("attention_bias", default=False)
    arch = dataclasses.replace(arch, attention_bias=bias, attention_out_bias=bias, qk_norm=True)
    return with_mixtures(arch, layer_mixtures(fields, _qwen_mixture_layers(fields), _qwen3_moe))


def _qwen3_moe(fields: ConfigFields) -> MoeSpec:
    return MoeSpec(
        gate=_qwen_gate(fields, num_experts=128, top_k=8),
        ffn_dim=fields.integer("moe_intermediate_size", default=768),
    )


def gpt_oss_from_hf(fields: ConfigFields) -> ArchConfig:
    """GptOssForCausalLM; attention sinks, biases, windows in every other layer, clamped experts."""
    if not fields.section("rope_scaling") and not fields.section("rope_parameters"):
        raise fields.wrong("rope_scaling", None, "stated, as in published checkpoints")
    arch = rope_family(fields, "gpt_oss", _gpt_oss_windows(fields))
    bias = fields.flag("attention_bias", default=True)
    arch = dataclasses.replace(
        arch, attention_bias=bias, attention_out_bias=bias, attention_sinks=True
    )
    return with_mixtures(arch, layer_mixtures(fields, range(arch.num_layers), _gpt_oss))


def _gpt_oss(fields: ConfigFields) -> MoeSpec:
    gate = GateSpec(
        num_experts=fields.integer("num_local_experts", "num_experts", default=128),
        top_k=fields.integer("num_experts_per_tok", "experts_per_token", default=4),
        score=Score.RAW,
        logit_bias=True,
    )
    return MoeSpec(
        gate=checked_gate(fields, gate),
        ffn_dim=fields.integer("intermediate_size"),
        expert_bias=True,
        glu_limit=fields.number("swiglu_limit", default=7.0),
        glu_alpha=fields.number("swiglu_alpha", default=1.702),
    )


def with_mixtures(arch: ArchConfig, mixtures: dict[int, MoeSpec]) -> ArchConfig:
    """The architecture with a mixture instead of the dense MLP in the layers given by index."""
    layers = tuple(
        dataclasses.replace(layer, ffn_dim=0, moe=mixtures[index]) if index in mixtures else layer
        for index, layer in enumerate(arch.layers)
    )
    return dataclasses.replace(arch, layers=layers)


def _qwen_gate(fields: ConfigFields, *, num_experts: int, top_k: int) -> GateSpec:
    gate = GateSpec(
        num_experts=fields.integer("num_experts", "num_local_experts", default=num_experts),
        top_k=fields.integer("num_experts_per_tok", default=top_k),
        normalise=fields.flag("norm_topk_prob", default=False),
    )
    return checked_gate(fields, gate)


def _qwen_mixture_layers(fields: ConfigFields) -> list[int]:
    """Every `decoder_sparse_step`-th layer, but those in `mlp_only_layers`."""
    step = fields.integer("decoder_sparse_step", default=1)
    dense = fields.integers("mlp_only_layers")
    count = fields.integer("num_hidden_layers")
    return [index for index in range(count) if index not in dense and (index + 1) % step == 0]


def _qwen2_moe_windows(fields: ConfigFields) -> list[int | None]:
    """By `layer_types`, else every other of the first `max_window_layers` layers."""
    if fields.raw("layer_types") is not None or not fields.flag(
        "use_sliding_window", default=False
    ):
        return qwen_windows(fields)
    window = fields.integer("sliding_window", default=4096)
    first = fields.integer("max_window_layers", default=28, minimum=0)
    count = fields.integer("num_hidden_layers")
    return [window if index % 2 == 0 and index < first else None for index in range(count)]


def _gpt_oss_windows(fields: ConfigFields) -> list[int | None]:
    """By `layer_types`, else every other layer from the first on."""
    count = fields.integer("num_hidden_layers")
    window = fields.integer("sliding_window", default=128)
    kinds = fields.texts("layer_types")
    if kinds is None:
        return [None if index % 2 else window for index in range(count)]
    if len(kinds) != count or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise fields.wrong(
            "layer_types", list(kinds), "full_attention or sliding_attention for each layer"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]
