"""Mixture layers that differ from each other, by transformers' `per_layer_config`."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.base.errors import ConfigError
from replicas.models.hf_config import arch_from_hf

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


def _mixture(name: str, **changes: Any) -> dict[str, Any]:
    return {
        **LLAMA,
        "model_type": None,
        "num_key_value_heads": 4,
        "architectures": [f"{name}ForCausalLM"],
        **changes,
    }


def test_layers_may_have_their_own_experts() -> None:
    changes = {
        "0": {"num_local_experts": 3},
        "2": {"num_local_experts": 5, "num_experts_per_tok": 3, "hidden_size": 64},
    }
    layers = arch_from_hf(_mixture("Mixtral", per_layer_config=changes)).layers
    gates = [layer.moe.gate for layer in layers if layer.moe]
    assert [(gate.num_experts, gate.top_k) for gate in gates] == [(3, 2), (8, 2), (5, 3)]
    deepseek = _mixture(
        "DeepseekV3",
        first_k_dense_replace=1,
        per_layer_config={"1": {"n_routed_experts": 16}, "2": {"moe_intermediate_size": 8}},
    )
    first, second, third = arch_from_hf(deepseek).layers
    assert first.moe is None
    assert second.moe is not None
    assert third.moe is not None
    assert (second.moe.gate.num_experts, third.moe.gate.num_experts) == (16, 256)
    assert (second.moe.ffn_dim, third.moe.ffn_dim) == (2048, 8)


@pytest.mark.parametrize(
    ("config", "param", "text"),
    [
        (
            _mixture("Mixtral", per_layer_config={"1": {"hidden_size": 32}}),
            "per_layer_config",
            "gives layer 1 its own hidden_size",
        ),
        (
            _mixture("Mixtral", per_layer_config={"1": {"skip": ["mlp"]}}),
            "per_layer_config",
            "skip",
        ),
        (_mixture("Mixtral", per_layer_config={"1": 4}), "per_layer_config", "an object for each"),
        (
            _mixture("Mixtral", per_layer_config={"1": {"num_local_experts": 1}}),
            "num_experts_per_tok",
            "more than the 1",
        ),
        (
            LLAMA | {"per_layer_config": {"0": {"intermediate_size": 32}}},
            "per_layer_config",
            "is not read of LlamaForCausalLM",
        ),
    ],
)
def test_layers_that_differ_in_something_else_are_refused(
    config: dict[str, Any], param: str, text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        arch_from_hf(config)
    assert caught.value.param == param
    assert text in f"{caught.value.cause} {caught.value.remedy}"
