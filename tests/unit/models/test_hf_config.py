"""config.json of both transformers generations -> ArchConfig; what is not supported is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from cluster.base.errors import ConfigError
from replicas.models.arch import NormKind, PositionKind, RopeSpec
from replicas.models.hf_config import SUPPORTED_ARCHITECTURES, arch_from_hf
from tests.support.tiny_models import TINY_NAMES, tiny_configs

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 131,
    "max_position_embeddings": 128,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 131,
}
OPT: dict[str, Any] = {
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 131,
}


def _family(name: str, **changes: Any) -> dict[str, Any]:
    return LLAMA | {"architectures": [f"{name}ForCausalLM"], "num_key_value_heads": 4} | changes


@pytest.mark.parametrize("name", TINY_NAMES)
def test_what_transformers_saves_is_understood(name: str) -> None:
    config = tiny_configs()[name]
    saved = json.loads(config.to_json_string())
    saved["architectures"] = [
        arch for arch in SUPPORTED_ARCHITECTURES if config.model_type in arch.lower()
    ]
    arch = arch_from_hf(saved)
    assert arch.family == config.model_type
    assert arch.model_dim == config.hidden_size
    assert arch.num_layers == config.num_hidden_layers
    assert arch.num_heads == config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", arch.num_heads)
    assert arch.num_kv_heads == (1 if arch.latent else heads)
    assert arch.tie_embeddings == config.tie_word_embeddings
    assert arch.eos_token_ids == ()


def test_a_minimal_llama_gets_its_class_defaults() -> None:
    arch = arch_from_hf(LLAMA)
    assert (arch.num_kv_heads, arch.head_dim, arch.norm_eps) == (8, 8, 1e-6)
    assert (arch.norm, arch.position) == (NormKind.RMS, PositionKind.ROPE)
    assert arch.rope == RopeSpec(theta=10000.0, rotary_dim=8)
    assert (arch.bos_token_id, arch.eos_token_ids) == (1, (2,))
    assert not arch.tie_embeddings
    assert arch.dtype == "float32"


def test_both_generations_of_rope_keys() -> None:
    section = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    old = arch_from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": section})
    new = arch_from_hf(LLAMA | {"rope_parameters": section | {"rope_theta": 5e5}})
    assert old == new
    assert old.rope is not None
    assert (old.rope.theta, old.rope.original_max_position) == (5e5, 64)
    assert old.max_position == 128


@pytest.mark.parametrize(
    ("section", "max_position"),
    [
        ({"type": "linear", "factor": 4.0}, 512),
        ({"type": "dynamic", "factor": 2.0}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}, 128),
    ],
)
def test_scaling_extends_the_context(section: dict[str, Any], max_position: int) -> None:
    assert arch_from_hf(LLAMA | {"rope_scaling": section}).max_position == max_position


def test_dtype_and_token_lists() -> None:
    old = arch_from_hf(LLAMA | {"torch_dtype": "bfloat16", "eos_token_id": [5, 7]})
    assert (old.dtype, old.eos_token_ids) == ("bfloat16", (5, 7))
    assert arch_from_hf(LLAMA | {"dtype": "float16", "eos_token_id": None}).eos_token_ids == ()


def test_sliding_windows() -> None:
    def windows(config: dict[str, Any]) -> list[int | None]:
        return [layer.sliding_window for layer in arch_from_hf(config).layers]

    assert windows(_family("Mistral")) == [4096] * 3
    assert windows(_family("Mistral", sliding_window=None)) == [None] * 3
    assert windows(_family("Qwen2", sliding_window=9)) == [None] * 3
    on = {"use_sliding_window": True, "sliding_window": 9}
    assert windows(_family("Qwen2", **on, max_window_layers=2)) == [None, None, 9]
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert windows(_family("Qwen3", **on, layer_types=kinds)) == [9, None, 9]


def test_family_traits() -> None:
    qwen2, qwen3 = arch_from_hf(_family("Qwen2")), arch_from_hf(_family("Qwen3"))
    assert (qwen2.attention_bias, qwen2.attention_out_bias) == (True, False)
    assert (qwen3.qk_norm, qwen3.head_dim, qwen3.attention_bias) == (True, 128, False)
    gpt2 = arch_from_hf(GPT2 | {"scale_attn_by_inverse_layer_idx": True})
    assert [layer.attention_scale for layer in gpt2.layers] == [0.25, 0.125]
    assert (gpt2.layers[0].ffn_dim, gpt2.tie_embeddings) == (256, True)
    opt = arch_from_hf(OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32})
    assert (opt.final_norm, opt.norm_before, opt.embed_dim, opt.position_offset) == (
        False,
        False,
        32,
        2,
    )
    assert not arch_from_hf(OPT | {"_remove_final_layer_norm": True}).final_norm


@pytest.mark.parametrize(
    ("config", "param", "text"),
    [
        ({**LLAMA, "architectures": ["BertModel"]}, "architectures", "LlamaForCausalLM"),
        ({**LLAMA, "architectures": None, "model_type": "t5"}, "architectures", "t5"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config", "quantised"),
        ({**LLAMA, "rope_scaling": {"type": "longrope", "factor": 2}}, "rope_scaling", "yarn"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "factor", "missing"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": "2"}}, "factor", "number"),
        (
            {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 3}},
            "rope_scaling",
            "alpha",
        ),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor", "0.5"),
        ({**LLAMA, "hidden_act": "mish"}, "hidden_act", "silu"),
        ({**LLAMA, "hidden_size": None}, "hidden_size", "missing"),
        ({**LLAMA, "hidden_size": "64"}, "hidden_size", "'64'"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers", "0"),
        ({**LLAMA, "num_key_value_heads": 3}, "num_key_value_heads", "divisor"),
        ({**LLAMA, "sliding_window": 64}, "sliding_window", "null"),
        ({**LLAMA, "head_dim": 7}, "head_dim", "even"),
        ({**LLAMA, "dtype": "float8_e4m3fn"}, "dtype", "float8"),
        ({**LLAMA, "tie_word_embeddings": "no"}, "tie_word_embeddings", "true or false"),
        ({**GPT2, "add_cross_attention": True}, "add_cross_attention", "decoder-only"),
        ({**GPT2, "n_head": 5}, "n_embd", "5 heads"),
        (_family("Mistral", layer_types=["full_attention"] * 3), "layer_types", "Mistral"),
        (_family("Qwen2", layer_types=["chunked_attention"] * 3), "layer_types", "chunked"),
        (_family("Qwen2", layer_types=["sliding_attention"] * 3), "sliding_window", "missing"),
    ],
)
def test_what_cannot_be_computed_is_refused(config: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arch_from_hf(config)
    assert caught.value.param == param
    assert text in str(caught.value)
    assert caught.value.remedy


_MIXTURE = {key: LLAMA[key] for key in LLAMA if key != "model_type"} | {"num_key_value_heads": 4}


def _mixture(name: str, **changes: Any) -> dict[str, Any]:
    return {**_MIXTURE, "architectures": [f"{name}ForCausalLM"], **changes}


def test_which_layers_are_mixtures() -> None:
    def widths(config: dict[str, Any]) -> list[tuple[int, int]]:
        return [
            (layer.ffn_dim, layer.moe.ffn_dim if layer.moe else 0)
            for layer in arch_from_hf(config).layers
        ]

    dense = LLAMA["intermediate_size"]
    qwen = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
    assert widths(_mixture("Mixtral")) == [(0, dense)] * 3
    assert widths(_mixture("Qwen3Moe", **qwen, decoder_sparse_step=2)) == [
        (dense, 0),
        (0, 16),
        (dense, 0),
    ]
    assert widths(_mixture("Qwen2Moe", **qwen, mlp_only_layers=[0])) == [
        (dense, 0),
        (0, 16),
        (0, 16),
    ]
    deepseek = {"n_routed_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    assert widths(_mixture("DeepseekV3", **deepseek, first_k_dense_replace=2)) == [
        (dense, 0),
        (dense, 0),
        (0, 8),
    ]


def test_deepseek_scales_and_windows_of_gpt_oss() -> None:
    yarn = {"type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    config = _mixture("DeepseekV3", rope_scaling=yarn, num_nextn_predict_layers=1)
    arch = arch_from_hf(config)
    assert arch.latent is not None
    assert arch.latent.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40.0) + 1.0) ** 2)
    assert (arch.num_kv_heads, arch.head_dim, arch.kv_planes) == (1, 576, 1)
    assert arch.num_prediction_layers == 1
    direct = arch_from_hf(config | {"q_lora_rank": None}).latent
    assert direct is not None
    assert direct.query_rank == 0
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 16}
    oss = arch_from_hf(_mixture("GptOss", rope_scaling=rope))
    assert [layer.sliding_window for layer in oss.layers] == [128, None, 128]
    assert oss.attention_sinks
    assert oss.layers[0].moe is not None
    assert oss.layers[0].moe.glu_limit == 7.0


@pytest.mark.parametrize(
    ("config", "param"),
    [
        (_mixture("Mixtral", num_local_experts=2, num_experts_per_tok=3), "num_experts_per_tok"),
        (_mixture("DeepseekV2", num_experts_per_tok=2, topk_method="noaux_tc"), "topk_method"),
        (_mixture("DeepseekV2", num_experts_per_tok=2, norm_topk_prob=True), "norm_topk_prob"),
        (_mixture("DeepseekV3", scoring_func="softmax"), "scoring_func"),
        (_mixture("DeepseekV3", moe_layer_freq=2), "moe_layer_freq"),
        (_mixture("DeepseekV3", n_group=7, first_k_dense_replace=1), "num_experts_per_tok"),
        (_mixture("Qwen3Moe", mlp_only_layers=["0"]), "mlp_only_layers"),
        (_mixture("GptOss"), "rope_scaling"),
        (_mixture("Mixtral", quantization_config={"quant_method": "mxfp4"}), "quantization_config"),
    ],
)
def test_mixtures_that_are_refused(config: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arch_from_hf(config)
    assert caught.value.param == param
