"""Models of the GPU benchmark: shapes as Hugging Face configs, weights made on the device.

No checkpoint is read: writing 16 GB of random numbers to a disk first would take longer than the
benchmark. Speed does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from replicas.kernels.ops import Kernels
from replicas.layers.weights import ResidentWeights, TensorSpec, WeightUnit

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "8b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 8192,
    },
    "1b": {
        **_LLAMA,
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        **_LLAMA,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
    },
}
_STD = 0.02


def random_weights(
    units: tuple[WeightUnit, ...], dtype: torch.dtype, device: torch.device, kernels: Kernels
) -> ResidentWeights:
    """Seeded weights of every unit, linears laid out for `kernels`; norms are ones."""
    generator = torch.Generator(device=device).manual_seed(0)
    return ResidentWeights(
        {unit.name: _unit(unit, dtype, device, kernels, generator) for unit in units}
    )


def weight_bytes(weights: ResidentWeights, units: tuple[WeightUnit, ...]) -> int:
    """Bytes that one token reads: everything but the embedding table, of which it reads a row."""
    return sum(
        tensor.nbytes
        for unit in units
        if unit.name != "embed"
        for tensor in weights.acquire(unit.name).values()
        if not tensor.is_meta
    )


def linear_parameters(units: tuple[WeightUnit, ...]) -> int:
    """Parameters that a prompt token multiplies with: the layers' linears."""
    return sum(
        spec.shape[0] * spec.shape[1]
        for unit in units
        if unit.name.startswith("layer.")
        for spec in unit.tensors
        if spec.is_linear
    )


def _unit(
    unit: WeightUnit,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for spec in unit.tensors:
        tensor = _tensor(spec, dtype, device, generator)
        tensors |= kernels.pack(spec.name, tensor) if spec.is_linear else {spec.name: tensor}
    return tensors


def _tensor(
    spec: TensorSpec, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    if len(spec.shape) == 1:
        return torch.ones(spec.shape, dtype=dtype, device=device)
    tensor = torch.empty(spec.shape, dtype=dtype, device=device)
    return tensor.normal_(std=_STD, generator=generator)
