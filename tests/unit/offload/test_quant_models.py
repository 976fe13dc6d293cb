"""Every family over quantised weights equals itself over the dequantised ones, token for token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from cluster.base.env import default_cache_dir
from cluster.dist.communicator import SingleRank
from offload.precision import Precision
from offload.quant import dequantise, quantise
from offload.quant_kernels import QuantKernels
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.kernels.ops import Kernels
from replicas.layers.weights import ResidentWeights, WeightProvider
from replicas.models.checkpoint import load_weights
from replicas.worker.assembly import RankSpec, WeightsRequest, build_runner
from replicas.worker.in_process_executor import InProcessExecutor
from tests.support.tiny_models import prompt_tokens, write_checkpoint

CACHE = default_cache_dir() / "kernels"
Store = Callable[[QuantKernels, str, torch.Tensor], dict[str, torch.Tensor]]


def as_codes(kernels: QuantKernels, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return kernels.quantise(name, weight)


def as_values(
    kernels: QuantKernels, name: str, weight: torch.Tensor, precision: Precision
) -> dict[str, torch.Tensor]:
    layout = kernels.layout(weight.dtype)
    if layout.why_not(weight.shape):
        return kernels.pack(name, weight)
    return kernels.pack(name, dequantise(quantise(weight, precision, layout), weight.dtype))


def weights(request: WeightsRequest, store: Store) -> WeightProvider:
    """All units in memory, linear weights of the layers as `store` makes them."""
    model, kernels = request.model, request.model.kernels
    assert isinstance(kernels, QuantKernels)
    resident = load_weights(
        request.spec.model_path, model.units, dtype=request.spec.dtype, device="cpu"
    )
    units: dict[str, dict[str, torch.Tensor]] = {}
    for unit in model.units:
        tensors = dict(resident.acquire(unit.name))
        for spec in unit.tensors:
            if spec.is_linear and unit.name.startswith("layer."):
                tensors |= store(kernels, spec.name, tensors.pop(spec.name))
        units[unit.name] = tensors
    return ResidentWeights(units)


def tokens(path: Path, dtype: str, precision: Precision, store: Store) -> list[list[int]]:
    config = SchedulerConfig(
        max_running_requests=4, max_step_tokens=32, max_context=64, block_size=4, num_blocks=64
    )
    spec = RankSpec(
        model_path=str(path),
        dtype=dtype,
        kv_dtype=dtype,
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        max_context=config.max_context,
    )

    def adapt(base: Kernels) -> Kernels:
        return QuantKernels(base, precision, CACHE)

    runner = build_runner(
        spec,
        SingleRank(),
        torch.device("cpu"),
        weights_factory=partial(weights, store=store),
        adapt_kernels=adapt,
    )
    engine = SyncEngine(Scheduler(config, ()), InProcessExecutor(runner))
    requests = [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=tuple(prompt_tokens(length, index)),
            params=SamplingParams(max_tokens=8, temperature=0.0),
        )
        for index, length in enumerate((3, 17, 40))
    ]
    return [list(done.token_ids) for done in engine.generate(requests)]


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama_biased", "float32"),
        ("llama_tied_wide", "bfloat16"),
        ("mistral", "bfloat16"),
        ("qwen2", "float32"),
        ("qwen3", "bfloat16"),
        ("gpt2", "float32"),
        ("opt_350m", "bfloat16"),
    ],
)
def test_streamed_codes_equal_resident_values(
    tmp_path: Path, name: str, dtype: str, precision: Precision
) -> None:
    path = write_checkpoint(name, tmp_path)
    codes = tokens(path, dtype, precision, as_codes)
    values = tokens(path, dtype, precision, partial(as_values, precision=precision))
    assert codes == values
    assert len({tuple(row) for row in codes}) > 1
