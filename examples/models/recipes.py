"""The two demo architectures and the recipe that trains them.

Head counts allow tensor parallelism of 1, 2 and 4; all sizes keep the bf16 checkpoint below 8 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from examples.models.demo_tokenizer import CONTEXT_LENGTH, END_OF_TEXT_ID, TURN_END_ID, VOCAB_SIZE

HEAD_DIM: MappingProxyType[str, Any] = MappingProxyType({"head_dim": 32})
"""Qwen3-MoE reads it from the config although its constructor does not name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Hyperparameters of one training run; learning rate is warmed up, held, then decayed."""

    seed: int = 20250
    batch_tokens: int = 2048
    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    length_shares: tuple[float, ...] = (0.35, 0.45, 0.12, 0.08)
    peak_learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.3
    """Part of the run that decays the rate as 1 - sqrt(t) (Haegele et al. 2024, 2405.18392)."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 1.0
    balance_weight: float = 0.02
    """Weight of the experts' load-balancing loss, mean over layers."""
    chat_share: float = 0.15
    held_out_share: float = 0.05


def build_dense() -> PreTrainedModel:
    """A Llama with grouped-query attention and tied embeddings, freshly initialised."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=[END_OF_TEXT_ID, TURN_END_ID],
    )
    return LlamaForCausalLM(config)


def build_moe() -> PreTrainedModel:
    """A Qwen3-MoE, every layer sparse: 8 experts, the best 2 renormalised to sum to one."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        **HEAD_DIM,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        router_aux_loss_coef=0.0,
        output_router_logits=True,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=[END_OF_TEXT_ID, TURN_END_ID],
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


BUILDERS: MappingProxyType[str, Callable[[], PreTrainedModel]] = MappingProxyType(
    {"dense": build_dense, "moe": build_moe}
)


def active_parameters(model: PreTrainedModel) -> int:
    """Parameters that take part in one token's forward pass; tied weights count once."""
    total: int = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    experts = getattr(config, "num_experts", 0)
    if not experts:
        return total
    per_expert: int = 3 * config.hidden_size * config.moe_intermediate_size
    idle: int = experts - config.num_experts_per_tok
    layers: int = config.num_hidden_layers
    return total - layers * idle * per_expert
