"""`config.json` of the Llama shape (Llama, Mistral, Qwen2, Qwen3) -> `ArchConfig`; torch-free.

Defaults are those of transformers' configuration classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replicas.models.arch import ArchConfig, LayerSpec, NormKind, PositionKind
from replicas.models.config_fields import ConfigFields
from replicas.models.hf_fields import activation_name, default_head_dim, shared_fields
from replicas.models.hf_rope import rope_from_hf, scaled_max_position


@dataclass(frozen=True, slots=True, kw_only=True)
class _RopeDefaults:
    """Defaults of a configuration class that differ between the RoPE families."""

    num_kv_heads: int | None = None
    head_dim: int | None = None
    theta: float = 10000.0
    norm_eps: float = 1e-6
    bos: int | None = None
    eos: tuple[int, ...] = ()


_ROPE_DEFAULTS: Mapping[str, _RopeDefaults] = {
    "llama": _RopeDefaults(bos=1, eos=(2,)),
    "mistral": _RopeDefaults(num_kv_heads=8, bos=1, eos=(2,)),
    "qwen2": _RopeDefaults(num_kv_heads=32),
    "qwen3": _RopeDefaults(num_kv_heads=32, head_dim=128),
    "mixtral": _RopeDefaults(num_kv_heads=8, theta=1e6, norm_eps=1e-5, bos=1, eos=(2,)),
    "qwen2_moe": _RopeDefaults(num_kv_heads=16),
    "qwen3_moe": _RopeDefaults(num_kv_heads=4),
    "gpt_oss": _RopeDefaults(num_kv_heads=8, head_dim=64, theta=150000.0, norm_eps=1e-5),
}


def llama_from_hf(fields: ConfigFields) -> ArchConfig:
    """LlamaForCausalLM; never has a sliding window."""
    if fields.raw("sliding_window") is not None:
        raise fields.wrong("sliding_window", fields.raw("sliding_window"), "null for Llama")
    bias = fields.flag("attention_bias", default=False)
    windows = [None] * fields.integer("num_hidden_layers")
    return dataclasses.replace(
        rope_family(fields, "llama", windows),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=fields.flag("mlp_bias", default=False),
    )


def mistral_from_hf(fields: ConfigFields) -> ArchConfig:
    """MistralForCausalLM; one sliding window for all layers, or none."""
    num_layers = fields.integer("num_hidden_layers")
    window = fields.optional_integer("sliding_window")
    if "sliding_window" not in fields:
        window = 4096
    expected = "full_attention" if window is None else "sliding_attention"
    kinds = fields.texts("layer_types")
    if kinds is not None and set(kinds) != {expected}:
        raise fields.wrong("layer_types", list(kinds), f"{expected} throughout for Mistral")
    return rope_family(fields, "mistral", [window] * num_layers)


def qwen2_from_hf(fields: ConfigFields) -> ArchConfig:
    """Qwen2ForCausalLM; biases on q, k and v alone."""
    arch = rope_family(fields, "qwen2", qwen_windows(fields))
    return dataclasses.replace(arch, attention_bias=True)


def qwen3_from_hf(fields: ConfigFields) -> ArchConfig:
    """Qwen3ForCausalLM; norms over each query and key head."""
    bias = fields.flag("attention_bias", default=False)
    return dataclasses.replace(
        rope_family(fields, "qwen3", qwen_windows(fields)),
        attention_bias=bias,
        attention_out_bias=bias,
        qk_norm=True,
    )


def qwen_windows(fields: ConfigFields) -> list[int | None]:
    """Each layer's window: by `layer_types`, else from layer `max_window_layers` on."""
    num_layers = fields.integer("num_hidden_layers")
    window = None
    if fields.flag("use_sliding_window", default=False):
        present = "sliding_window" in fields
        window = fields.optional_integer("sliding_window") if present else 4096
    kinds = fields.texts("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", default=28, minimum=0)
        return [window if index >= first else None for index in range(num_layers)]
    if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise fields.wrong(
            "layer_types", list(kinds), "full_attention or sliding_attention for each layer"
        )
    if window is None and "sliding_attention" in kinds:
        raise fields.wrong(
            "sliding_window", None, "set, with use_sliding_window: true, for sliding layers"
        )
    return [window if kind == "sliding_attention" else None for kind in kinds]


def rope_family(fields: ConfigFields, family: str, windows: Sequence[int | None]) -> ArchConfig:
    """What Llama, its kin and the mixtures of their shape have in common: RMS norm, RoPE, dense
    gated MLP, no biases.

    Args:
        windows: sliding window of each layer.

    Raises:
        ConfigError: a missing or mistyped key, or a setting that is not supported.
    """
    defaults = _ROPE_DEFAULTS[family]
    model_dim = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    head_dim = fields.integer(
        "head_dim", default=defaults.head_dim or default_head_dim(fields, "hidden_size", num_heads)
    )
    # A key that is written as null means "as many as query heads"; an absent one, the default.
    absent = None if "num_key_value_heads" in fields else defaults.num_kv_heads
    num_kv_heads = fields.integer("num_key_value_heads", default=absent or num_heads)
    if num_heads % num_kv_heads:
        raise fields.wrong("num_key_value_heads", num_kv_heads, f"a divisor of {num_heads} heads")
    max_position = fields.integer("max_position_embeddings")
    rope = rope_from_hf(fields, head_dim, max_position, defaults.theta)
    ffn_dim = fields.integer("intermediate_size")
    return ArchConfig(
        family=family,
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=tuple(LayerSpec(ffn_dim=ffn_dim, sliding_window=window) for window in windows),
        max_position=scaled_max_position(rope, max_position),
        norm=NormKind.RMS,
        norm_eps=fields.number("rms_norm_eps", default=defaults.norm_eps),
        activation=activation_name(fields, "hidden_act", "silu"),
        gated_mlp=True,
        position=PositionKind.ROPE,
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings", default=False),
        **shared_fields(fields, bos=defaults.bos, eos=defaults.eos),
    )
