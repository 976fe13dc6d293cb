"""Checkpoints without weights worth the name: a real config.json, tiny or header-only tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLAMA_3_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
"""Meta-Llama-3-8B's own figures."""

TINY: Mapping[str, Any] = {
    **LLAMA_3_8B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": 256,
    "eos_token_id": [1, 2],
}


def write_checkpoint(directory: Path, config: Mapping[str, Any] = TINY) -> Path:
    """A directory that has every file a checkpoint needs."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    tensors = {"a.weight": np.zeros((4, 2), np.float32), "b.weight": np.zeros(3, np.float16)}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
