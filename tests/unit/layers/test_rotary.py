"""Frequencies and rotation equal transformers', kind by kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from cluster.base.errors import ConfigError
from replicas.kernels.torch_ops import rotate
from replicas.layers.rotary import Rotary, attention_scaling, inverse_frequencies
from replicas.models.arch import RopeSpec
from replicas.models.config_fields import ConfigFields
from replicas.models.hf_rope import rope_from_hf
from tests.support.compiled_kernels import threads

MAX_POSITION = 64
KINDS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.5},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.2},
]


def _both(section: dict[str, Any], theta: float) -> tuple[LlamaConfig, RopeSpec]:
    parameters = section | {"rope_theta": theta}
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=dict(parameters),
    )
    fields = ConfigFields({"rope_parameters": parameters})
    return config, rope_from_hf(fields, 32, MAX_POSITION)


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("section", KINDS, ids=lambda section: section["rope_type"])
def test_angles(section: dict[str, Any], theta: float) -> None:
    config, spec = _both(section, theta)
    if section["rope_type"] != "default":
        expected, scale = ROPE_INIT_FUNCTIONS[section["rope_type"]](config, torch.device("cpu"))
        torch.testing.assert_close(inverse_frequencies(spec), expected, atol=0, rtol=1e-6)
        assert attention_scaling(spec) == pytest.approx(scale)
    positions = torch.arange(MAX_POSITION)
    cos, sin = Rotary(spec, torch.float32, "cpu").angles(positions)
    their_cos, their_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    torch.testing.assert_close(cos[:, 0], their_cos[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sin[:, 0], their_sin[0], atol=1e-5, rtol=1e-5)
    heads = torch.randn(MAX_POSITION, 3, 32)
    theirs, _ = apply_rotary_pos_emb(heads[None], heads[None], their_cos, their_sin, 2)
    torch.testing.assert_close(rotate(heads, cos, sin), theirs[0], atol=2e-5, rtol=1e-5)


def test_dynamic_grows_token_by_token_and_ignores_neighbours() -> None:
    config, spec = _both({"rope_type": "dynamic", "factor": 2.5}, 10000.0)
    positions = torch.tensor([3, 200, 63, 64, 65, 10])
    cos, _ = Rotary(spec, torch.float32, "cpu").angles(positions)
    for index, position in enumerate(positions.tolist()):
        fresh = LlamaRotaryEmbedding(config)
        expected, _ = fresh(torch.zeros(1), torch.tensor([[position]]))
        torch.testing.assert_close(cos[index, 0], expected[0, 0], atol=1e-5, rtol=1e-5)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="longrope"):
        inverse_frequencies(RopeSpec(kind="longrope", rotary_dim=8))


@pytest.mark.parametrize("section", KINDS[:4], ids=lambda section: section["rope_type"])
def test_a_position_has_the_same_bits_whatever_was_asked_before(section: dict[str, Any]) -> None:
    _, spec = _both(section, 10000.0)
    whole, one_by_one = Rotary(spec, torch.float32, "cpu"), Rotary(spec, torch.float32, "cpu")
    with threads(3):
        cos, sin = whole.angles(torch.arange(700))
    for position in (0, 5, 63, 64, 300, 17, 699):
        cos_one, sin_one = one_by_one.angles(torch.tensor([position]))
        assert torch.equal(cos_one[0], cos[position])
        assert torch.equal(sin_one[0], sin[position])
    assert cos_one.shape == (1, 1, spec.rotary_dim)
