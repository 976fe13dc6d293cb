"""The runner of a rank whose model transformers computes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from cluster.base.zero3_plan import KvLayer, Zero3Plan
from cluster.dist.communicator import Communicator
from offload.zero3.engine import Zero3Engine
from offload.zero3.model import HookedWeights, Zero3Model
from offload.zero3.start_check import NUM_TOKENS, check_model
from replicas.kernels.memory import HugePages
from replicas.models.context import torch_dtype
from replicas.worker.assembly import OnLoaded, RankSpec, RunnerFactory, checkpoint_grammars
from replicas.worker.device import out_of_memory_as_error
from replicas.worker.model_runner import ModelRunner


def zero3_runner(plan: Zero3Plan, cache_dir: Path | None = None) -> RunnerFactory:
    """The `RunnerFactory` of such a rank; it loads, and proves the model fit to be served.

    Raises:
        ConfigError: see `Zero3Engine` and `check_model`; or several ranks are asked for.
        CorruptWeightsError: the checkpoint does not fit its configuration.
        DeviceOutOfMemoryError: the cache does not fit.
    """
    ops_dir = cache_dir or default_cache_dir()

    def make(
        spec: RankSpec, communicator: Communicator, device: torch.device, on_loaded: OnLoaded | None
    ) -> ModelRunner:
        if communicator.size != 1 or device.type != "cpu":
            raise ConfigError(
                "The provider deepspeed-zero3 serves with one rank, on the CPU.",
                "Set parallel.tp to 1 and device to cpu.",
            )
        dtype = torch_dtype(spec.dtype)
        engine = Zero3Engine(Path(spec.model_path), plan, dtype, ops_dir)
        try:
            model = Zero3Model(engine, plan, spec.block_size)
            per_request = -(-NUM_TOKENS // spec.block_size)
            scratch = _caches(plan.model.kv, 2 * per_request, spec.block_size, dtype)
            check_model(engine, model, scratch, spec.block_size, dtype)
            caches = _caches(plan.model.kv, spec.num_blocks, spec.block_size, dtype)
        except BaseException:
            engine.close()
            raise
        return ModelRunner(
            model,
            HookedWeights(engine),
            caches,
            block_size=spec.block_size,
            max_context=spec.max_context,
            is_output_rank=True,
            clock=time.perf_counter,
            grammars=checkpoint_grammars(spec.model_path, model.arch.vocab_size),
        )

    return make


def _caches(
    layers: Sequence[KvLayer], num_blocks: int, block_size: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    """A zeroed (2, N, B, G, P) cache for each layer, empty for one that keeps nothing."""
    pages = HugePages()
    with out_of_memory_as_error(f"allocating {num_blocks} KV cache blocks"):
        shapes = [(2, num_blocks, block_size, kv.num_heads, kv.width) for kv in layers]
        return [pages.zeros(shape, dtype) for shape in shapes]
