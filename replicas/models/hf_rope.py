"""The rotary-embedding part of a Hugging Face `config.json`, as a `RopeSpec`.

Reads both styles: `rope_theta` + `rope_scaling` (transformers 4) and `rope_parameters`
(transformers 5). Defaults are those of `transformers.modeling_rope_utils`. A kind or a key that
this engine does not compute is an error: a wrong frequency gives fluent nonsense.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.base.errors import ConfigError
from replicas.models.arch import RopeSpec
from replicas.models.config_fields import ConfigFields

_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",  # says how the checkpoint was made; changes nothing at inference
        }
    ),
}
ROPE_KINDS = tuple(_KEYS)


def rope_from_hf(
    fields: ConfigFields, head_dim: int, max_position: int, default_theta: float = 10000.0
) -> RopeSpec:
    """The `RopeSpec` of a config.

    Args:
        fields: the whole config.
        head_dim: P; rotated as a whole.
        max_position: `max_position_embeddings`.
        default_theta: the family's base, for configs that state none.

    Raises:
        ConfigError: an unknown kind, a key that does not belong to it, or a partial rotation.
    """
    section = fields.section("rope_scaling") or fields.section("rope_parameters")
    rope = ConfigFields(section, "the rope parameters of config.json")
    kind = rope.text("rope_type", "type", default="default")
    _check_supported(kind, section)
    partial = rope.raw("partial_rotary_factor") or fields.raw("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise ConfigError(
            f"partial_rotary_factor {partial} is not supported.",
            "Only models that rotate whole heads are.",
            param="partial_rotary_factor",
        )
    if head_dim % 2:
        raise fields.wrong("head_dim", head_dim, "even, because RoPE rotates pairs")
    theta = rope.number("rope_theta", default=fields.number("rope_theta", default=default_theta))
    if kind == "default":
        return RopeSpec(theta=theta, rotary_dim=head_dim)
    if kind in ("linear", "dynamic"):
        return RopeSpec(
            kind=kind,
            theta=theta,
            rotary_dim=head_dim,
            factor=rope.number("factor"),
            original_max_position=max_position,
        )
    original = fields.optional_integer("original_max_position_embeddings")
    if original is None:
        original = rope.integer("original_max_position_embeddings", default=max_position)
    if kind == "llama3":
        return RopeSpec(
            kind=kind,
            theta=theta,
            rotary_dim=head_dim,
            factor=rope.number("factor"),
            original_max_position=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    return _yarn(rope, RopeSpec(theta=theta, rotary_dim=head_dim), original, max_position)


def scaled_max_position(spec: RopeSpec, max_position: int) -> int:
    """Positions that the scaling is meant to reach.

    linear and dynamic stretch `max_position_embeddings` itself, YaRN its original context; llama3
    configs already state the stretched length.
    """
    if spec.kind in ("linear", "dynamic"):
        return int(max_position * spec.factor)
    if spec.kind == "yarn":
        return max(max_position, int(spec.original_max_position * spec.factor))
    return max_position


def _yarn(rope: ConfigFields, base: RopeSpec, original: int, max_position: int) -> RopeSpec:
    attention = rope.raw("attention_factor")
    return RopeSpec(
        kind="yarn",
        theta=base.theta,
        rotary_dim=base.rotary_dim,
        factor=rope.number("factor", default=max_position / original),
        original_max_position=original,
        attention_factor=None if attention is None else rope.number("attention_factor"),
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        mscale=rope.number("mscale") if rope.raw("mscale") else 0.0,
        mscale_all_dim=rope.number("mscale_all_dim") if rope.raw("mscale_all_dim") else 0.0,
        truncate=rope.flag("truncate", default=True),
    )


def _check_supported(kind: str, section: Mapping[str, Any]) -> None:
    if kind not in _KEYS:
        raise ConfigError(
            f"RoPE type {kind!r} is not supported.",
            f"Supported: {', '.join(ROPE_KINDS)}.",
            param="rope_scaling",
        )
    known = _KEYS[kind] | _ALWAYS
    unknown = sorted(
        key for key, value in section.items() if value is not None and key not in known
    )
    if unknown:
        raise ConfigError(
            f"RoPE type {kind!r} has no {', '.join(unknown)}.",
            f"It knows {', '.join(sorted(known))}; a nested or newer form is not supported.",
            param="rope_scaling",
        )
