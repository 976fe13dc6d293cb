"""Configurations of small mixtures of experts, one for each variant of router and attention."""

from __future__ import annotations

from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 131
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
ROPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **NO_SPECIAL,
}
_LATENT = ROPE | {
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
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.3,
    "original_max_position_embeddings": 32,
}


def mixtures() -> dict[str, PreTrainedConfig]:
    """Mixtures of experts with keys and values per head."""
    return {
        "mixtral": MixtralConfig(
            **ROPE, num_local_experts=6, num_experts_per_tok=2, sliding_window=None
        ),
        "mixtral_window": MixtralConfig(
            **(ROPE | {"num_key_value_heads": 4}),
            num_local_experts=4,
            num_experts_per_tok=3,
            sliding_window=7,
        ),
        "qwen2_moe": Qwen2MoeConfig(
            **ROPE,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            mlp_only_layers=[1],
        ),
        "qwen3_moe": Qwen3MoeConfig(
            **ROPE,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            tie_word_embeddings=True,
        ),
        "qwen3_moe_sparse": Qwen3MoeConfig(
            **ROPE,
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
            **ROPE,
            num_experts=20,
            num_experts_per_tok=4,
            moe_intermediate_size=48,
            shared_expert_intermediate_size=40,
            mlp_only_layers=[1],
        ),
        "qwen3_moe_many": Qwen3MoeConfig(
            **(ROPE | {"num_hidden_layers": 1}),
            head_dim=16,
            num_experts=640,
            num_experts_per_tok=6,
            moe_intermediate_size=16,
            norm_topk_prob=True,
        ),
        "gpt_oss": GptOssConfig(
            **ROPE,
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


def latents() -> dict[str, PreTrainedConfig]:
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
            rope_parameters=_YARN,
        ),
        "deepseek_v3": DeepseekV3Config(
            **_LATENT, num_experts_per_tok=3, n_group=4, topk_group=2, rope_parameters=_YARN
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


def uneven() -> dict[str, PreTrainedConfig]:
    """Mixtures whose layers have different numbers of experts."""
    return {
        "mixtral_uneven": MixtralConfig(
            **ROPE,
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=None,
            per_layer_config={
                "1": {"num_local_experts": 3},
                "2": {"num_local_experts": 7, "num_experts_per_tok": 3},
            },
        ),
        "qwen3_moe_uneven": Qwen3MoeConfig(
            **ROPE,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            per_layer_config={"0": {"num_experts": 5}, "1": {"moe_intermediate_size": 32}},
        ),
    }
