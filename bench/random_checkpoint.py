"""Seeded random bf16 checkpoints of well-known shapes: speed does not depend on the values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units

_SHARED = {
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "dense-160m": {
        **_SHARED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
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
}


def write_random_checkpoint(shape: str, directory: Path, seed: int = 0) -> int:
    """Write `config.json` and weights.

    Returns:
        bytes of weights that one token must read (all but the embedding table).
    """
    config = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    read_bytes = 0
    for unit in weight_units(arch_from_hf(config), 0, 1):
        for spec in unit.tensors:
            for source, size in zip(spec.sources, spec.full_shapes, strict=True):
                noise = torch.randn(size, generator=generator)
                centre = 1.0 if len(size) == 1 else 0.0
                scale = 0.1 if len(size) == 1 else 1 / math.sqrt(size[-1])
                tensors[source.name] = (centre + scale * noise).bfloat16()
                if unit.name != "embed":
                    read_bytes += tensors[source.name].nbytes
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return read_bytes
