"""Weight units of the Llama shape (Llama, Mistral, Qwen, mixtures) from Hugging Face names.

Torch-free; `replicas/models/llama.py` computes with the local names given here.
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
from replicas.layers.weights import Source, TensorSpec, WeightUnit
from replicas.models.arch import ArchConfig
from replicas.models.latent_weights import latent_tensors
from replicas.models.mixture_weights import mixture_tensors

_TOKENS = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def llama_units(arch: ArchConfig, shard: Shard) -> tuple[WeightUnit, ...]:
    """embed, layer.0 ..., norm, head of one rank."""
    table = (arch.vocab_size, arch.model_dim)
    duplicates = (_HEAD,) if arch.tie_embeddings else ()
    head = _TOKENS if arch.tie_embeddings else _HEAD
    layers = tuple(
        WeightUnit(name=f"layer.{index}", tensors=_layer(arch, index, shard))
        for index in range(arch.num_layers)
    )
    norm = replicated("norm.weight", "model.norm.weight", (arch.model_dim,))
    return (
        WeightUnit(
            name="embed", tensors=(vocabulary("tokens", _TOKENS, table, shard, duplicates),)
        ),
        *layers,
        WeightUnit(name="norm", tensors=(norm,), unused=_prediction_layers(arch)),
        WeightUnit(name="head", tensors=(vocabulary("lm_head", head, table, shard, duplicates),)),
    )


def _prediction_layers(arch: ArchConfig) -> tuple[str, ...]:
    """DeepSeek-V3 checkpoints may hold layers that predict further tokens; they are not used."""
    extra = range(arch.num_layers, arch.num_layers + arch.num_prediction_layers)
    return tuple(f"model.layers.{index}." for index in extra)


def _layer(arch: ArchConfig, index: int, shard: Shard) -> tuple[TensorSpec, ...]:
    prefix = f"model.layers.{index}"
    return (
        replicated("attention_norm.weight", f"{prefix}.input_layernorm.weight", (arch.model_dim,)),
        *_attention(arch, f"{prefix}.self_attn", shard),
        replicated(
            "mlp_norm.weight", f"{prefix}.post_attention_layernorm.weight", (arch.model_dim,)
        ),
        *_feed_forward(arch, index, shard),
    )


def _attention(arch: ArchConfig, prefix: str, shard: Shard) -> list[TensorSpec]:
    if arch.latent is not None:
        return latent_tensors(arch, arch.latent, prefix, shard)
    head_dim = arch.head_dim
    heads = {"q": arch.num_heads, "k": arch.num_kv_heads, "v": arch.num_kv_heads}
    pieces = tuple(
        Piece(name=f"{prefix}.{letter}_proj", out_features=count * head_dim, unit=head_dim)
        for letter, count in heads.items()
    )
    width = arch.num_heads * head_dim
    specs = [column_weight("qkv", pieces, arch.model_dim, shard, transposed=False)]
    if arch.attention_bias:
        specs.append(column_bias("qkv", pieces, shard))
    if arch.qk_norm:
        specs += [
            replicated(f"{letter}_norm.weight", f"{prefix}.{letter}_norm.weight", (head_dim,))
            for letter in ("q", "k")
        ]
    out = (arch.model_dim, width)
    specs.append(row_weight("attention_out", f"{prefix}.o_proj", out, shard, transposed=False))
    if arch.attention_sinks:
        start, stop = shard.span(arch.num_heads)
        sinks = Source(name=f"{prefix}.sinks", start=start, stop=stop)
        specs.append(
            TensorSpec(
                name="sinks",
                shape=(stop - start,),
                sources=(sinks,),
                full_shapes=((arch.num_heads,),),
            )
        )
    if arch.attention_out_bias:
        specs.append(replicated("attention_out.bias", f"{prefix}.o_proj.bias", (arch.model_dim,)))
    return specs


def _feed_forward(arch: ArchConfig, index: int, shard: Shard) -> list[TensorSpec]:
    if arch.layers[index].moe is not None:
        return mixture_tensors(arch, index, shard)
    ffn_dim, prefix = arch.layers[index].ffn_dim, f"model.layers.{index}.mlp"
    pieces = tuple(
        Piece(name=f"{prefix}.{name}", out_features=ffn_dim) for name in ("gate_proj", "up_proj")
    )
    out = (arch.model_dim, ffn_dim)
    specs = [
        column_weight("up", pieces, arch.model_dim, shard, transposed=False),
        row_weight("down", f"{prefix}.down_proj", out, shard, transposed=False),
    ]
    if arch.mlp_bias:
        specs += [
            column_bias("up", pieces, shard),
            replicated("down.bias", f"{prefix}.down_proj.bias", (arch.model_dim,)),
        ]
    return specs
