"""Weight units of GPT-2, and of mixtures of its shape, from Hugging Face names.

GPT-2 stores its linears as (in, out), with q, k and v side by side in `c_attn`. Torch-free;
`replicas/models/gpt2.py` computes with the local names given here.
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
from replicas.models.mixture_weights import mixture_tensors

_TOKENS = "transformer.wte.weight"
_HEAD = "lm_head.weight"


def gpt2_units(arch: ArchConfig, shard: Shard) -> tuple[WeightUnit, ...]:
    """embed, layer.0 ..., norm, head of one rank."""
    table = (arch.vocab_size, arch.model_dim)
    duplicates = (_HEAD,) if arch.tie_embeddings else ()
    head = _TOKENS if arch.tie_embeddings else _HEAD
    positions = (arch.max_position, arch.model_dim)
    layers = tuple(
        WeightUnit(name=f"layer.{index}", tensors=_layer(arch, index, shard))
        for index in range(arch.num_layers)
    )
    return (
        WeightUnit(
            name="embed",
            tensors=(
                vocabulary("tokens", _TOKENS, table, shard, duplicates),
                replicated("positions", "transformer.wpe.weight", positions),
            ),
        ),
        *layers,
        WeightUnit(name="norm", tensors=_norm("norm", "transformer.ln_f", arch)),
        WeightUnit(name="head", tensors=(vocabulary("lm_head", head, table, shard, duplicates),)),
    )


def _layer(arch: ArchConfig, index: int, shard: Shard) -> tuple[TensorSpec, ...]:
    prefix = f"transformer.h.{index}"
    dim = arch.model_dim
    qkv = tuple(
        Piece(
            name=f"{prefix}.attn.c_attn",
            out_features=dim,
            unit=arch.head_dim,
            offset=part * dim,
            stored_out=3 * dim,
        )
        for part in range(3)
    )
    out = f"{prefix}.attn.c_proj"
    return (
        *_norm("attention_norm", f"{prefix}.ln_1", arch),
        column_weight("qkv", qkv, dim, shard, transposed=True),
        column_bias("qkv", qkv, shard),
        row_weight("attention_out", out, (dim, dim), shard, transposed=True),
        replicated("attention_out.bias", f"{out}.bias", (dim,)),
        *_norm("mlp_norm", f"{prefix}.ln_2", arch),
        *_feed_forward(arch, index, shard),
    )


def _feed_forward(arch: ArchConfig, index: int, shard: Shard) -> list[TensorSpec]:
    if arch.layers[index].moe is not None:
        return mixture_tensors(arch, index, shard)
    prefix = f"transformer.h.{index}.mlp"
    dim, ffn_dim = arch.model_dim, arch.layers[index].ffn_dim
    up = (Piece(name=f"{prefix}.c_fc", out_features=ffn_dim),)
    return [
        column_weight("up", up, dim, shard, transposed=True),
        column_bias("up", up, shard),
        row_weight("down", f"{prefix}.c_proj", (dim, ffn_dim), shard, transposed=True),
        replicated("down.bias", f"{prefix}.c_proj.bias", (dim,)),
    ]


def _norm(name: str, source: str, arch: ArchConfig) -> tuple[TensorSpec, ...]:
    return tuple(
        replicated(f"{name}.{part}", f"{source}.{part}", (arch.model_dim,))
        for part in ("weight", "bias")
    )
