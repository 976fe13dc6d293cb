"""Small seeded random checkpoints of every family, written by transformers itself.

All parameters are random, biases and norm weights too, and wide enough that greedy choices are
decisive. The vocabulary (131) is not divisible by two or four, contexts are short enough for every
RoPE scaling and sliding window to bite within a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from tests.support.tiny_mixtures import NO_SPECIAL, ROPE, VOCAB_SIZE, latents, mixtures, uneven
from tests.support.uneven_models import deepspeed_moe_configs, untrained_model

_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    **NO_SPECIAL,
}
_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **NO_SPECIAL,
    "pad_token_id": 1,
}


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(ROPE | changes))


def _scaled(kind: str, **rope: Any) -> LlamaConfig:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **rope}
    return _llama(max_position_embeddings=32, rope_parameters=parameters)


def tiny_configs() -> Mapping[str, PreTrainedConfig]:
    """Every variant by name."""
    return {
        "llama": _llama(),
        "llama_biased": _llama(attention_bias=True, mlp_bias=True, num_key_value_heads=8),
        "llama_tied_wide": _llama(head_dim=16, tie_word_embeddings=True, num_key_value_heads=1),
        "llama_llama3": _scaled(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        "llama_linear": _scaled("linear", factor=3.0),
        "llama_dynamic": _scaled("dynamic", factor=2.5),
        "llama_yarn": _scaled("yarn", factor=4.0, original_max_position_embeddings=32),
        "mistral": MistralConfig(**(ROPE | {"sliding_window": 7, "num_key_value_heads": 4})),
        "mistral_full": MistralConfig(**(ROPE | {"sliding_window": None})),
        "qwen2": Qwen2Config(**ROPE),
        "qwen2_mixed": Qwen2Config(
            **ROPE, use_sliding_window=True, sliding_window=6, max_window_layers=1
        ),
        "qwen3": Qwen3Config(**ROPE, head_dim=16, tie_word_embeddings=True),
        **mixtures(),
        **latents(),
        **uneven(),
        **deepspeed_moe_configs(_GPT2),
        "gpt2": GPT2Config(**_GPT2),
        "gpt2_scaled": GPT2Config(
            **_GPT2, n_inner=80, scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False
        ),
        "gpt2_unscaled": GPT2Config(**_GPT2, scale_attn_weights=False),
        "gpt2_odd": GPT2Config(**_GPT2, n_inner=77),
        "opt": OPTConfig(**_OPT),
        "opt_350m": OPTConfig(**_OPT, do_layer_norm_before=False, word_embed_proj_dim=32),
        "opt_bare": OPTConfig(
            **_OPT,
            enable_bias=False,
            layer_norm_elementwise_affine=False,
            activation_function="gelu",
            tie_word_embeddings=False,
        ),
    }


TINY_NAMES = tuple(tiny_configs())


def tiny_model(name: str, seed: int = 0) -> PreTrainedModel:
    """The transformers model of one variant, fp32, eager attention, in eval mode."""
    config = tiny_configs()[name]
    model = untrained_model(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Norm weights lie around one, everything else around zero.
            is_norm_weight = parameter.dim() == 1 and not key.endswith(("bias", "sinks"))
            center = parameter.mean() if is_norm_weight else 0.0
            parameter.copy_(center + 0.15 * noise)
    return model


def write_checkpoint(name: str, directory: Path, *, seed: int = 0, **options: Any) -> Path:
    """Save a variant as a Hugging Face checkpoint; `options` go to `save_pretrained`."""
    tiny_model(name, seed).save_pretrained(directory, **options)
    if name in {
        **uneven(),
        **deepspeed_moe_configs(_GPT2),
    }:  # The model itself knows nothing of its layers' differences.
        tiny_configs()[name].save_pretrained(directory)
    return directory


def prompt_tokens(length: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist()


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Logits of every position from one plain forward pass, (T, V) fp32."""
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].float()
    return logits


@torch.inference_mode()
def reference_greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' own greedy generation."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    generated: list[int] = output[0, len(prompt) :].tolist()
    return generated
