"""`config.json` of DeepSeek-V2 and V3 (and models of their shape) -> `ArchConfig`; torch-free.

Defaults are those of transformers' configuration classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from moe.spec import GateSpec, GroupScore, MoeSpec, Score
from replicas.models.arch import (
    ArchConfig,
    LatentSpec,
    LayerSpec,
    NormKind,
    PositionKind,
    RopeSpec,
)
from replicas.models.config_fields import ConfigFields
from replicas.models.hf_fields import activation_name, shared_fields
from replicas.models.hf_mixture import checked_gate, layer_mixtures, with_mixtures
from replicas.models.hf_rope import rope_from_hf, scaled_max_position

_GREEDY, _GROUPS = "greedy", "group_limited_greedy"


def deepseek_v2_from_hf(fields: ConfigFields) -> ArchConfig:
    """DeepseekV2ForCausalLM; softmax scores, groups ranked by their best expert."""
    _require(fields, "scoring_func", "softmax")
    _require(fields, "norm_topk_prob", expected=False)
    return _deepseek(fields, "deepseek_v2", _v2_mixture, first_dense=0, bos=1, eos=2)


def _v2_mixture(fields: ConfigFields) -> MoeSpec:
    method = fields.text("topk_method", default=_GREEDY)
    if method not in (_GREEDY, _GROUPS):
        raise fields.wrong("topk_method", method, f"{_GREEDY} or {_GROUPS}")
    grouped = method == _GROUPS
    gate = GateSpec(
        num_experts=fields.integer("n_routed_experts", default=64),
        top_k=fields.integer("num_experts_per_tok"),
        num_groups=fields.integer("n_group") if grouped else 1,
        top_groups=fields.integer("topk_group") if grouped else 1,
        scale=fields.number("routed_scaling_factor", default=1.0),
    )
    return _mixture(fields, gate, ffn_dim=1407, shared=2)


def deepseek_v3_from_hf(fields: ConfigFields) -> ArchConfig:
    """DeepseekV3ForCausalLM; sigmoid scores with a correction bias, groups by their two best."""
    _require(fields, "scoring_func", "sigmoid")
    _require(fields, "topk_method", "noaux_tc")
    return _deepseek(fields, "deepseek_v3", _v3_mixture, first_dense=3, bos=0, eos=1)


def _v3_mixture(fields: ConfigFields) -> MoeSpec:
    gate = GateSpec(
        num_experts=fields.integer("n_routed_experts", default=256),
        top_k=fields.integer("num_experts_per_tok", default=8),
        score=Score.SIGMOID,
        selection_bias=True,
        num_groups=fields.integer("n_group", default=8),
        top_groups=fields.integer("topk_group", default=4),
        group_score=GroupScore.TOP2_SUM,
        normalise=fields.flag("norm_topk_prob", default=True),
        scale=fields.number("routed_scaling_factor", default=2.5),
    )
    return _mixture(fields, gate, ffn_dim=2048, shared=1)


def _mixture(fields: ConfigFields, gate: GateSpec, *, ffn_dim: int, shared: int) -> MoeSpec:
    width = fields.integer("moe_intermediate_size", default=ffn_dim)
    number = fields.integer("n_shared_experts", default=shared)
    return MoeSpec(gate=checked_gate(fields, gate), ffn_dim=width, shared_ffn_dim=number * width)


def _deepseek(
    fields: ConfigFields,
    family: str,
    mixture: Callable[[ConfigFields], MoeSpec],
    *,
    first_dense: int,
    bos: int,
    eos: int,
) -> ArchConfig:
    _require(fields, "moe_layer_freq", 1)
    _require(fields, "mlp_bias", expected=False)
    num_layers = fields.integer("num_hidden_layers")
    num_dense = fields.integer("first_k_dense_replace", default=first_dense, minimum=0)
    dense = LayerSpec(ffn_dim=fields.integer("intermediate_size"))
    max_position = fields.integer("max_position_embeddings")
    rope = rope_from_hf(fields, fields.integer("qk_rope_head_dim", default=64), max_position)
    latent = _latent(fields, rope)
    arch = ArchConfig(
        family=family,
        model_dim=fields.integer("hidden_size"),
        num_heads=fields.integer("num_attention_heads"),
        num_kv_heads=1,
        head_dim=latent.rank + latent.rope_dim,
        layers=(dense,) * num_layers,
        max_position=scaled_max_position(rope, max_position),
        norm=NormKind.RMS,
        norm_eps=fields.number("rms_norm_eps", default=1e-6),
        activation=activation_name(fields, "hidden_act", "silu"),
        gated_mlp=True,
        position=PositionKind.ROPE,
        rope=rope,
        latent=latent,
        num_prediction_layers=fields.integer("num_nextn_predict_layers", default=0, minimum=0),
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        **shared_fields(fields, bos=bos, eos=(eos,)),
    )
    return with_mixtures(arch, layer_mixtures(fields, range(num_dense, num_layers), mixture))


def _latent(fields: ConfigFields, rope: RopeSpec) -> LatentSpec:
    nope_dim = fields.integer("qk_nope_head_dim", default=128)
    # A null means that queries are projected directly; an absent key, the default.
    absent = 0 if "q_lora_rank" in fields else 1536
    return LatentSpec(
        rank=fields.integer("kv_lora_rank", default=512),
        query_rank=fields.optional_integer("q_lora_rank") or absent,
        nope_dim=nope_dim,
        rope_dim=rope.rotary_dim,
        value_dim=fields.integer("v_head_dim", default=128),
        scale=(nope_dim + rope.rotary_dim) ** -0.5 * _yarn_factor(rope),
        interleaved=fields.flag("rope_interleave", default=True),
        bias=fields.flag("attention_bias", default=False),
    )


def _yarn_factor(rope: RopeSpec) -> float:
    """YaRN sharpens DeepSeek's scores by the square of its mscale for all dimensions."""
    if rope.kind != "yarn" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def _require(fields: ConfigFields, key: str, expected: str | int | bool) -> None:
    """A setting that changes the maths and has only one supported value."""
    found = fields.raw(key)
    if found is not None and found != expected:
        raise fields.wrong(key, found, f"{expected!r}; nothing else is supported")
