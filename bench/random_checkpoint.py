"""Seeded random bf16 checkpoints of well-known shapes: speed does not depend on the values.

Written as Hugging Face lays them out, tokenizer included, from a table of its own: every engine
reads the same directory, and none of ours decides what is in it. Every token of the tokenizer is
printable text except the 256 single bytes, so that detokenising has something to do.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 32000
SPECIALS = ("<unk>", "<s>", "</s>")
_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
_SMALL = {
    **_SHARED,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "dense-160m": {**_SMALL, "architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "dense-1b": {
        **_SHARED,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "moe-8x": {
        **_SMALL,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 2048,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomCheckpoint:
    """A checkpoint on disk and what one token has to read of it."""

    name: str
    path: Path
    vocab_size: int
    weight_bytes_per_token: int
    """All weights but the embedding table and the experts that a token is not sent to."""
    kv_bytes_per_position: int
    """Keys and values of one position in all layers, bf16."""

    def bytes_per_token(self, context: float) -> float:
        """What one token of a lone request reads when `context` positions came before it."""
        return self.weight_bytes_per_token + self.kv_bytes_per_position * context


def random_checkpoint(
    name: str, folder: Path, seed: int = 0, config: Mapping[str, Any] | None = None
) -> RandomCheckpoint:
    """The seeded checkpoint of a shape in `folder`, written unless it is there already.

    Args:
        config: a shape that is not one of `SHAPES`.
    """
    config = SHAPES[name] if config is None else config
    digest = hashlib.sha256(json.dumps([config, seed]).encode()).hexdigest()[:8]
    path = folder / f"{name}-{digest}"
    if not path.is_dir():
        unfinished = path.with_name(f"{path.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_tokenizer(unfinished)
        (unfinished / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(_random_tensors(config, seed), unfinished / "model.safetensors")
        unfinished.rename(path)
    return RandomCheckpoint(
        name=name,
        path=path,
        vocab_size=config["vocab_size"],
        weight_bytes_per_token=2 * round(values_per_token(config)),
        kv_bytes_per_position=4
        * config["num_hidden_layers"]
        * config["num_key_value_heads"]
        * config["head_dim"],
    )


def tensor_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as Hugging Face's classes of the family expect them."""
    width, vocab = config["hidden_size"], config["vocab_size"]
    yield _EMBEDDING, (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _layer_shapes(config):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (vocab, width)


def values_per_token(config: Mapping[str, Any]) -> float:
    """Weights that one token is multiplied with."""
    routed = config.get("num_experts_per_tok", 1) / config.get("num_experts", 1)
    return sum(
        math.prod(shape) * (routed if ".experts." in name else 1.0)
        for name, shape in tensor_shapes(config)
        if name != _EMBEDDING
    )


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer whose merges are all pairs of printable characters, then triples."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    merges = [(first, second) for first in printable for second in printable]
    merges += [(first + second, third) for first, second in merges for third in printable]
    merges = merges[: VOCAB_SIZE - len(SPECIALS) - len(alphabet)]
    tokens = [*SPECIALS, *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIALS[0],
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "model_max_length": _SHARED["max_position_embeddings"],
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")


def _layer_shapes(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, head_dim = config["hidden_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    yield "input_layernorm.weight", (width,)
    yield "self_attn.q_proj.weight", (queries, width)
    yield "self_attn.k_proj.weight", (keys, width)
    yield "self_attn.v_proj.weight", (keys, width)
    yield "self_attn.o_proj.weight", (width, queries)
    if config["model_type"].startswith("qwen3"):
        yield "self_attn.q_norm.weight", (head_dim,)
        yield "self_attn.k_norm.weight", (head_dim,)
    yield "post_attention_layernorm.weight", (width,)
    experts = config.get("num_experts", 0)
    if experts:
        yield "mlp.gate.weight", (experts, width)
    ffn = config["moe_intermediate_size"] if experts else config["intermediate_size"]
    for part in [f"mlp.experts.{number}" for number in range(experts)] or ["mlp"]:
        yield f"{part}.gate_proj.weight", (ffn, width)
        yield f"{part}.up_proj.weight", (ffn, width)
        yield f"{part}.down_proj.weight", (width, ffn)


def _random_tensors(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config):
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1
        scale = 0.1 if is_norm else 1 / math.sqrt(shape[-1])
        tensors[name] = (scale * noise + (1.0 if is_norm else 0.0)).bfloat16()
    return tensors
