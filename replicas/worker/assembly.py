"""One rank put together: model, weights, cache, runner; the same for workers and bare engines."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.dist.communicator import Communicator
from cluster.dist.node_segment import NodeSegment
from moe.layout import ExpertLayout
from replicas.kernels.ops import Kernels
from replicas.layers.weights import WeightProvider
from replicas.models.checkpoint import load_weights
from replicas.models.context import torch_dtype
from replicas.models.decoder import DecoderModel, LayeredModel
from replicas.models.hf_config import arch_from_hf
from replicas.models.registry import build_model
from replicas.sampling.grammars import Grammars
from replicas.text.tokenizer_files import read_tokenizer_files
from replicas.worker.decode_graphs import GraphedModel, GraphLimits
from replicas.worker.device import GraphRecorder, async_device
from replicas.worker.kv_tensors import KvCacheSpec, allocate_kv_caches
from replicas.worker.model_runner import ModelRunner

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """What a rank's runner is made from; `kernels` and `attention_backend` as in `build_model`."""

    model_path: str
    dtype: str
    kv_dtype: str
    block_size: int
    num_blocks: int
    max_context: int
    kernels: str = "auto"
    attention_backend: str = "auto"
    max_graph_rows: int = 256
    """Largest batch whose decode steps are captured, on a device that has graphs."""
    draft_tokens: int = 0
    """Most drafted tokens of a request; steps that check drafts are captured too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSharers:
    """Data-parallel ranks of a node, which need the same weights but for their experts."""

    index: int
    """This rank among them."""
    count: int
    join: Callable[[int], NodeSegment]
    """Makes memory of so many bytes that they have in common; all of them call it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRequest:
    """What a rank's weights are made for."""

    spec: RankSpec
    model: DecoderModel
    rank: int
    size: int
    device: torch.device
    kv_bytes: int
    """What the rank's cache will take of the device."""
    on_progress: Callable[[int, int], None] | None
    sharers: WeightSharers | None = None


WeightsFactory = Callable[[WeightsRequest], WeightProvider]
ModelAdapter = Callable[[LayeredModel, Sequence[torch.Tensor]], DecoderModel]
"""Wraps a rank's model, given with its caches, in what runs its layers in another way."""
OnLoaded = Callable[[int, int], None]
"""Told (bytes loaded, bytes in all)."""
RunnerFactory = Callable[[RankSpec, Communicator, torch.device, OnLoaded | None], ModelRunner]
"""Makes a rank whose model is not one of the registry's."""


def resident_weights(request: WeightsRequest) -> WeightProvider:
    """All of the rank's weights on its device; raises as `load_weights`."""
    return load_weights(
        request.spec.model_path,
        request.model.units,
        dtype=request.spec.dtype,
        device=request.device.type,
        kernels=request.model.kernels,
        on_progress=request.on_progress,
    )


def build_runner(  # noqa: PLR0913 - where a rank is put together
    spec: RankSpec,
    communicator: Communicator,
    device: torch.device,
    on_progress: OnLoaded | None = None,
    weights_factory: WeightsFactory = resident_weights,
    adapt_kernels: Callable[[Kernels], Kernels] | None = None,
    expert_layout: ExpertLayout | None = None,
    adapt_model: ModelAdapter | None = None,
    sharers: WeightSharers | None = None,
) -> ModelRunner:
    """Load this rank's weights, allocate its cache and make its runner; rank 0 gives the output.

    Args:
        on_progress: told (bytes loaded, bytes in all).
        weights_factory: where the weights come from; may raise errors of its own.
        adapt_kernels, expert_layout: as in `build_model`.
        adapt_model: wraps the model that the runner calls.
        sharers: ranks that may hold one copy of the weights together; None: this one is alone.

    Raises:
        ConfigError: the checkpoint's architecture is not supported or cannot be split so.
        CorruptWeightsError: a checkpoint file is damaged.
        DeviceOutOfMemoryError: the device cannot hold it.
    """
    arch = arch_from_hf(json.loads((Path(spec.model_path) / "config.json").read_text()))
    model = build_model(
        arch,
        communicator,
        dtype=spec.dtype,
        device=device.type,
        block_size=spec.block_size,
        kernels=spec.kernels,
        attention_backend=spec.attention_backend,
        adapt_kernels=adapt_kernels,
        expert_layout=expert_layout,
    )
    cache = KvCacheSpec(
        num_layers=arch.num_layers,
        num_blocks=spec.num_blocks,
        block_size=spec.block_size,
        num_kv_heads=arch.kv_heads_per_rank(communicator.size),
        head_dim=arch.head_dim,
        planes=arch.kv_planes,
        dtype=torch_dtype(spec.kv_dtype),
    )
    weights = weights_factory(
        WeightsRequest(
            spec=spec,
            model=model,
            rank=communicator.rank,
            size=communicator.size,
            device=device,
            kv_bytes=cache.total_bytes,
            on_progress=on_progress,
            sharers=sharers,
        )
    )
    kv_caches = allocate_kv_caches(cache, device)
    adapted = adapt_model(model, kv_caches) if adapt_model else model
    return ModelRunner(
        _with_graphs(adapted, weights, spec, device),
        weights,
        kv_caches,
        block_size=spec.block_size,
        max_context=spec.max_context,
        is_output_rank=communicator.rank == 0,
        clock=time.perf_counter,
        device=async_device(device),
        grammars=checkpoint_grammars(spec.model_path, arch.vocab_size),
    )


def checkpoint_grammars(model_path: str, vocab_size: int) -> Grammars:
    """Grammars over a checkpoint's tokenizer, which is read when the first request has one."""
    return Grammars(lambda: read_tokenizer_files(model_path).backend_json, vocab_size)


def _with_graphs(
    model: DecoderModel, weights: WeightProvider, spec: RankSpec, device: torch.device
) -> DecoderModel:
    """The model with its decode steps replayed from graphs, where that can be."""
    reasons = GraphedModel.why_not(model, weights, device.type)
    if spec.attention_backend not in ("auto", "triton_paged", "flashinfer"):
        reasons.append(f"attention {spec.attention_backend} launches by the contents of a step")
    if reasons:
        _log.info("decode graphs: none, because %s", "; ".join(reasons))
        return model
    limits = GraphLimits(
        max_rows=spec.max_graph_rows,
        max_context=spec.max_context,
        block_size=spec.block_size,
        # FlashInfer's part of a step needs a plan of its own, made on the host.
        max_query=1 if spec.attention_backend == "flashinfer" else 1 + spec.draft_tokens,
    )
    return GraphedModel(model, limits, device, GraphRecorder())
