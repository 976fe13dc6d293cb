"""Weight units of OPT from Hugging Face names.

OPT-350m differs from its siblings: norms stand after the residual sums, there is no final norm,
and two projections join a narrower embedding to the layers. Torch-free; `replicas/models/opt.py`
computes with the local names given here.
"""

from __future__ import annotations

from replicas.layers.shards import (
    Piece,
    Shard,
    column_bias,
    column_weight,
    replicated,
    row_weight,
    vocabulary,
)
from replicas.layers.weights import TensorSpec, WeightUnit
from replicas.models.arch import ArchConfig

_BASE = "model.decoder"
_TOKENS = f"{_BASE}.embed_tokens.weight"
_HEAD = "lm_head.weight"


def opt_units(arch: ArchConfig, shard: Shard) -> tuple[WeightUnit, ...]:
    """embed, layer.0 ..., norm (if there is one), head of one rank."""
    layers = tuple(
        WeightUnit(name=f"layer.{index}", tensors=_layer(arch, index, shard))
        for index in range(arch.num_layers)
    )
    norm = _norm("norm", f"{_BASE}.final_layer_norm", arch) if arch.final_norm else ()
    return (
        WeightUnit(name="embed", tensors=_embed(arch, shard)),
        *layers,
        *((WeightUnit(name="norm", tensors=norm),) if norm else ()),
        WeightUnit(name="head", tensors=_head(arch, shard)),
    )


def _embed(arch: ArchConfig, shard: Shard) -> tuple[TensorSpec, ...]:
    width = arch.embed_dim or arch.model_dim
    duplicates = (_HEAD,) if arch.tie_embeddings else ()
    rows = arch.max_position + arch.position_offset
    specs = [
        vocabulary("tokens", _TOKENS, (arch.vocab_size, width), shard, duplicates),
        replicated("positions", f"{_BASE}.embed_positions.weight", (rows, arch.model_dim)),
    ]
    if arch.embed_dim:
        shape = (arch.model_dim, width)
        specs.append(replicated("project_in.weight", f"{_BASE}.project_in.weight", shape))
    return tuple(specs)


def _head(arch: ArchConfig, shard: Shard) -> tuple[TensorSpec, ...]:
    width = arch.embed_dim or arch.model_dim
    source, duplicates = (_TOKENS, (_HEAD,)) if arch.tie_embeddings else (_HEAD, ())
    table = vocabulary("lm_head", source, (arch.vocab_size, width), shard, duplicates)
    if not arch.embed_dim:
        return (table,)
    shape = (width, arch.model_dim)
    return replicated("project_out.weight", f"{_BASE}.project_out.weight", shape), table


def _layer(arch: ArchConfig, index: int, shard: Shard) -> tuple[TensorSpec, ...]:
    prefix = f"{_BASE}.layers.{index}"
    dim, ffn_dim = arch.model_dim, arch.layers[index].ffn_dim
    qkv = tuple(
        Piece(name=f"{prefix}.self_attn.{letter}_proj", out_features=dim, unit=arch.head_dim)
        for letter in "qkv"
    )
    up = (Piece(name=f"{prefix}.fc1", out_features=ffn_dim),)
    out, down = f"{prefix}.self_attn.out_proj", f"{prefix}.fc2"
    specs = [
        *_norm("attention_norm", f"{prefix}.self_attn_layer_norm", arch),
        column_weight("qkv", qkv, dim, shard, transposed=False),
        row_weight("attention_out", out, (dim, dim), shard, transposed=False),
        *_norm("mlp_norm", f"{prefix}.final_layer_norm", arch),
        column_weight("up", up, dim, shard, transposed=False),
        row_weight("down", down, (dim, ffn_dim), shard, transposed=False),
    ]
    if arch.attention_bias:
        specs.append(column_bias("qkv", qkv, shard))
    if arch.attention_out_bias:
        specs.append(replicated("attention_out.bias", f"{out}.bias", (dim,)))
    if arch.mlp_bias:
        specs.append(column_bias("up", up, shard))
        specs.append(replicated("down.bias", f"{down}.bias", (dim,)))
    return tuple(specs)


def _norm(name: str, source: str, arch: ArchConfig) -> tuple[TensorSpec, ...]:
    if not arch.norm_affine:
        return ()
    return tuple(
        replicated(f"{name}.{part}", f"{source}.{part}", (arch.model_dim,))
        for part in ("weight", "bias")
    )
