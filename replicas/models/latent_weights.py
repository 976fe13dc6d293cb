"""Weights of latent attention (DeepSeek) from Hugging Face names; torch-free.

`kv_b_proj` holds, head by head, what makes keys and what makes values of a latent. Each head's
parts become linears of their own: the first turned round, because it is applied to queries.
"""

from __future__ import annotations

from replicas.layers.shards import Piece, Shard, column_weight, replicated, row_weight
from replicas.layers.weights import Source, TensorSpec
from replicas.models.arch import ArchConfig, LatentSpec


def latent_tensors(
    arch: ArchConfig, latent: LatentSpec, prefix: str, shard: Shard
) -> list[TensorSpec]:
    """The attention part of a layer's unit.

    Args:
        prefix: `model.layers.{i}.self_attn`.
    """
    width = latent.rank + latent.rope_dim
    values = arch.num_heads * latent.value_dim
    out = (arch.model_dim, values)
    specs = [
        *_queries(arch, latent, prefix, shard),
        replicated(
            "latent_down.weight", f"{prefix}.kv_a_proj_with_mqa.weight", (width, arch.model_dim)
        ),
        replicated("latent_norm.weight", f"{prefix}.kv_a_layernorm.weight", (latent.rank,)),
        *_heads(arch, latent, f"{prefix}.kv_b_proj.weight", shard),
        row_weight("attention_out", f"{prefix}.o_proj", out, shard, transposed=False),
    ]
    if latent.bias:
        specs += [
            replicated("latent_down.bias", f"{prefix}.kv_a_proj_with_mqa.bias", (width,)),
            replicated("attention_out.bias", f"{prefix}.o_proj.bias", (arch.model_dim,)),
        ]
    return specs


def _queries(arch: ArchConfig, latent: LatentSpec, prefix: str, shard: Shard) -> list[TensorSpec]:
    head = latent.nope_dim + latent.rope_dim
    name, source_width = "q_proj", arch.model_dim
    specs = []
    if latent.query_rank:
        name, source_width = "q_b_proj", latent.query_rank
        shape = (latent.query_rank, arch.model_dim)
        specs = [
            replicated("query_down.weight", f"{prefix}.q_a_proj.weight", shape),
            replicated("query_norm.weight", f"{prefix}.q_a_layernorm.weight", (latent.query_rank,)),
        ]
        if latent.bias:
            specs.append(
                replicated("query_down.bias", f"{prefix}.q_a_proj.bias", (latent.query_rank,))
            )
    piece = Piece(name=f"{prefix}.{name}", out_features=arch.num_heads * head, unit=head)
    return [*specs, column_weight("query", (piece,), source_width, shard, transposed=False)]


def _heads(arch: ArchConfig, latent: LatentSpec, source: str, shard: Shard) -> list[TensorSpec]:
    """Both projections of each of this rank's heads."""
    height = latent.nope_dim + latent.value_dim
    full_shapes = ((arch.num_heads * height, latent.rank),)
    first, last = shard.span(arch.num_heads)
    specs = []
    for local, head in enumerate(range(first, last)):
        start, middle, stop = head * height, head * height + latent.nope_dim, (head + 1) * height
        specs += [
            TensorSpec(
                name=f"key_up.{local}.weight",
                shape=(latent.rank, latent.nope_dim),
                sources=(Source(name=source, start=start, stop=middle, transpose=True),),
                full_shapes=full_shapes,
            ),
            TensorSpec(
                name=f"value_up.{local}.weight",
                shape=(latent.value_dim, latent.rank),
                sources=(Source(name=source, start=middle, stop=stop),),
                full_shapes=full_shapes,
            ),
        ]
    return specs
