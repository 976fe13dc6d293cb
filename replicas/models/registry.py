"""`ArchConfig` -> the model of one rank. A new family is one row here and its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from cluster.dist.communicator import Communicator
from moe.layout import ExpertLayout
from replicas.attention.select import select_backend
from replicas.kernels.ops import Kernels
from replicas.kernels.select import select_kernels
from replicas.models.arch import ArchConfig
from replicas.models.context import ModelContext, attention_spec, torch_dtype
from replicas.models.decoder import LayeredModel
from replicas.models.gpt2 import Gpt2Model
from replicas.models.llama import LlamaModel
from replicas.models.opt import OptModel

_MODELS: Mapping[str, Callable[[ArchConfig, ModelContext], LayeredModel]] = {
    "llama": LlamaModel,
    "mistral": LlamaModel,
    "qwen2": LlamaModel,
    "qwen3": LlamaModel,
    "mixtral": LlamaModel,
    "qwen2_moe": LlamaModel,
    "qwen3_moe": LlamaModel,
    "gpt_oss": LlamaModel,
    "deepseek_v2": LlamaModel,
    "deepseek_v3": LlamaModel,
    "gpt2": Gpt2Model,
    "deepspeed_moe": Gpt2Model,
    "opt": OptModel,
}


def build_model(  # noqa: PLR0913 - where a model is put together
    arch: ArchConfig,
    communicator: Communicator,
    *,
    dtype: str,
    device: str,
    block_size: int,
    attention_backend: str = "auto",
    kernels: str = "auto",
    cache_dir: Path | None = None,
    adapt_kernels: Callable[[Kernels], Kernels] | None = None,
    expert_layout: ExpertLayout | None = None,
) -> LayeredModel:
    """The model of this rank, without weights (those come with each call).

    Args:
        communicator: the tensor-parallel axis.
        dtype: what weights, activations and KV are in: float32, bfloat16 or float16.
        device: `cpu` or `cuda`.
        block_size: tokens per KV block.
        attention_backend: `auto` or a name of `replicas.attention.select`.
        kernels: `auto` (the fastest that can) or another choice of `select_kernels`.
        cache_dir: where compiled kernels are kept; None: the user's cache directory.
        adapt_kernels: wraps the chosen kernels, for weights in a form that they do not know.
        expert_layout: which rank holds which routed experts; None: this rank holds its
            tensor-parallel slice of all of them.

    Raises:
        ConfigError: unknown family, dtype or backend, or a split that does not work out.
    """
    if arch.family not in _MODELS:
        raise ConfigError(
            f"Model family {arch.family!r} is not supported.", f"Use one of {sorted(_MODELS)}."
        )
    if reasons := arch.why_not_tp(communicator.size, whole_experts=expert_layout is not None):
        raise ConfigError(
            f"The model cannot be split over {communicator.size} ranks: {'; '.join(reasons)}.",
            "Choose another tensor-parallel size.",
            param="tp",
        )
    spec = attention_spec(arch, communicator.size, dtype, device, block_size)
    chosen = select_kernels(
        kernels, torch_dtype(dtype), device, (cache_dir or default_cache_dir()) / "kernels"
    )
    context = ModelContext(
        communicator=communicator,
        dtype=torch_dtype(dtype),
        device=device,
        attention_spec=spec,
        attention_backend=select_backend(spec, attention_backend, chosen),
        kernels=adapt_kernels(chosen) if adapt_kernels else chosen,
        expert_layout=expert_layout,
    )
    return _MODELS[arch.family](arch, context)
