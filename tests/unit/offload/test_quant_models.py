"""Every family over quantised weights equals itself over the dequantised ones, token for token."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from cluster.base.plan import OffloadPlan
from cluster.dist.communicator import SingleRank
from offload.assembly import kernel_adapter, streamed_weights
from offload.precision import Precision
from offload.quant import dequantise, quantise
from offload.quant_kernels import QuantKernels
from replicas.api import GenerationRequest, SamplingParams
from replicas.engine.scheduler import Scheduler
from replicas.engine.scheduler_config import SchedulerConfig
from replicas.engine.sync_engine import SyncEngine
from replicas.layers.weights import ResidentWeights, WeightProvider
from replicas.models.checkpoint import load_weights
from replicas.worker.assembly import RankSpec, WeightsFactory, WeightsRequest, build_runner
from replicas.worker.in_process_executor import InProcessExecutor
from tests.support.tiny_models import prompt_tokens, write_checkpoint


def dequantised(
    kernels: QuantKernels, name: str, weight: torch.Tensor, precision: Precision
) -> dict[str, torch.Tensor]:
    layout = kernels.layout(weight.dtype)
    if layout.why_not(weight.shape):
        return kernels.pack(name, weight)
    return kernels.pack(name, dequantise(quantise(weight, precision, layout), weight.dtype))


def resident_values(request: WeightsRequest, precision: Precision) -> WeightProvider:
    """All units in memory, linear weights of the layers as their codes say."""
    model, kernels = request.model, request.model.kernels
    assert isinstance(kernels, QuantKernels)
    resident = load_weights(
        request.spec.model_path, model.units, dtype=request.spec.dtype, device="cpu"
    )
    units: dict[str, dict[str, torch.Tensor]] = {}
    for unit in model.units:
        tensors = dict(resident.acquire(unit.name))
        for spec in unit.tensors:
            if spec.name == "lm_head" and "lm_head" in tensors:
                tensors |= kernels.pack("lm_head", tensors["lm_head"])
            elif spec.is_linear and unit.name.startswith("layer."):
                tensors |= dequantised(kernels, spec.name, tensors.pop(spec.name), precision)
        units[unit.name] = tensors
    return ResidentWeights(units)


def streamed_plan(disk: Path, precision: Precision) -> OffloadPlan:
    return OffloadPlan(
        disk_path=str(disk),
        device_bytes=64 << 20,
        host_bytes=0,
        workspace_bytes=0,
        resident_units=("layer.1", "head"),
        precision=precision.value,
    )


def tokens(
    path: Path, dtype: str, precision: Precision, factory: WeightsFactory
) -> list[list[int]]:
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

    runner = build_runner(
        spec,
        SingleRank(),
        torch.device("cpu"),
        weights_factory=factory,
        adapt_kernels=kernel_adapter(streamed_plan(path, precision)),
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
    plan = streamed_plan(tmp_path / "disk", precision)
    codes = tokens(path, dtype, precision, streamed_weights(plan))
    values = tokens(path, dtype, precision, partial(resident_values, precision=precision))
    assert codes == values
    assert len({tuple(row) for row in codes}) > 1
