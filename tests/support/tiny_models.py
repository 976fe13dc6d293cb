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
    DeepseekV2Config,
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCAB_SIZE = 131
_NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_ROPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_NO_SPECIAL,
}
_LATENT = _ROPE | {
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_LATENT_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "original_max_position_embeddings": 32,
}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    **_NO_SPECIAL,
}
_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    **_NO_SPECIAL,
    "pad_token_id": 1,
}


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**(_ROPE | changes))


def _scaled(kind: str, **rope: Any) -> LlamaConfig:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **rope}
    return _llama(max_position_embeddings=32, rope_parameters=parameters)


def _mixtures() -> dict[str, PreTrainedConfig]:
    """Mixtures of experts with keys and values per head."""
    return {
        "mixtral": MixtralConfig(
            **_ROPE, num_local_experts=6, num_experts_per_tok=2, sliding_window=None
        ),
        "mixtral_window": MixtralConfig(
            **(_ROPE | {"num_key_value_heads": 4}),
            num_local_experts=4,
            num_experts_per_tok=3,
            sliding_window=7,
        ),
        "qwen2_moe": Qwen2MoeConfig(
            **_ROPE,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            mlp_only_layers=[1],
        ),
        "qwen3_moe": Qwen3MoeConfig(
            **_ROPE,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        ),
        "qwen3_moe_sparse": Qwen3MoeConfig(
            **_ROPE,
            head_dim=8,
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            decoder_sparse_step=2,
            use_sliding_window=True,
            sliding_window=9,
            attention_bias=True,
        ),
        "qwen2_moe_blocks": Qwen2MoeConfig(
            **_ROPE,
            num_experts=20,
            num_experts_per_tok=4,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=40,
            mlp_only_layers=[1],
        ),
        "qwen3_moe_many": Qwen3MoeConfig(
            **(_ROPE | {"num_hidden_layers": 1}),
            head_dim=16,
            num_experts=640,
            num_experts_per_tok=6,
            moe_intermediate_size=16,
            norm_topk_prob=True,
        ),
        "gpt_oss": GptOssConfig(
            **_ROPE,
            head_dim=16,
            num_local_experts=6,
            num_experts_per_tok=3,
            sliding_window=9,
            swiglu_limit=0.6,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 32,
            },
        ),
    }


def _latents() -> dict[str, PreTrainedConfig]:
    """Mixtures of experts with latent attention."""
    return {
        "deepseek_v2": DeepseekV2Config(
            **(_LATENT | {"q_lora_rank": None}),
            num_experts_per_tok=2,
            routed_scaling_factor=1.5,
        ),
        "deepseek_v2_groups": DeepseekV2Config(
            **_LATENT,
            num_experts_per_tok=3,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            attention_bias=True,
            rope_parameters=_LATENT_YARN,
        ),
        "deepseek_v3": DeepseekV3Config(
            **_LATENT, num_experts_per_tok=3, n_group=4, topk_group=2, rope_parameters=_LATENT_YARN
        ),
        "deepseek_v3_plain": DeepseekV3Config(
            **_LATENT,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            norm_topk_prob=False,
            rope_interleave=False,
        ),
    }


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
        "mistral": MistralConfig(**(_ROPE | {"sliding_window": 7, "num_key_value_heads": 4})),
        "mistral_full": MistralConfig(**(_ROPE | {"sliding_window": None})),
        "qwen2": Qwen2Config(**_ROPE),
        "qwen2_mixed": Qwen2Config(
            **_ROPE, use_sliding_window=True, sliding_window=6, max_window_layers=1
        ),
        "qwen3": Qwen3Config(**_ROPE, head_dim=16, tie_word_embeddings=True),
        **_mixtures(),
        **_latents(),
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
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
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
