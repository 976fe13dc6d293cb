"""Small seeded random checkpoints of architectures that we have no model code for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BloomConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MptConfig,
    OlmoeConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB_SIZE = 131
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_WIDE = _SIZES | {"intermediate_size": 96, "max_position_embeddings": 128}


def foreign_configs() -> Mapping[str, PreTrainedConfig]:
    """Rotary, partly rotary, ALiBi; tied heads, sliding windows, soft caps, parallel residuals,
    one key head, routed experts."""
    return {
        "phi": PhiConfig(**_WIDE, num_key_value_heads=2),
        "gemma2": Gemma2Config(
            **(_WIDE | {"pad_token_id": 0}), num_key_value_heads=2, head_dim=16, sliding_window=8
        ),
        "falcon": FalconConfig(**_SIZES, max_position_embeddings=128),
        "falcon_alibi": FalconConfig(**_SIZES, alibi=True, multi_query=False),
        "bloom": BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=64, n_layer=3, n_head=4,
                             bos_token_id=None, eos_token_id=None, pad_token_id=None),
        "gpt_neox": GPTNeoXConfig(**_WIDE),
        "cohere": CohereConfig(**_WIDE, num_key_value_heads=2),
        "mpt": MptConfig(vocab_size=VOCAB_SIZE, d_model=64, n_layers=3, n_heads=4, max_seq_len=128),
        "olmoe": OlmoeConfig(**_WIDE, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
    }  # fmt: skip


FOREIGN_NAMES = tuple(foreign_configs())


def write_foreign(
    name: str, directory: Path, seed: int = 0, vocab_size: int = VOCAB_SIZE
) -> PreTrainedModel:
    """Save a checkpoint and give the model, fp32, in eval mode."""
    config = foreign_configs()[name]
    config.vocab_size = vocab_size
    model = AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm_weight = parameter.dim() == 1 and not key.endswith("bias")
            parameter.copy_((parameter.mean() if is_norm_weight else 0.0) + 0.15 * noise)
    model.save_pretrained(directory)
    return model
