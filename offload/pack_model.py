"""A checkpoint's store for one rank, laid out for the kernels of a worker on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.base.env import default_cache_dir
from cluster.base.plan import OffloadPlan
from offload.assembly import codec_of, kernel_adapter, make_packer
from offload.layout import Store
from offload.pack import StoreRequest, ensure_store
from replicas.kernels.select import select_kernels
from replicas.models.checkpoint import ProgressCallback
from replicas.models.context import torch_dtype
from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units


def pack_model(  # noqa: PLR0913 - what a store depends on
    model_path: str,
    *,
    dtype: str,
    precision: str,
    compression: str = "none",
    disk_path: str,
    rank: int = 0,
    size: int = 1,
    on_progress: ProgressCallback | None = None,
) -> Store:
    """The store of `rank`: what is there, or packed now; as an offload worker would find it.

    Raises:
        ConfigError: an unsupported checkpoint, an unknown dtype, precision or compression, no place
            on the disk.
        CorruptWeightsError: the checkpoint is damaged.
    """
    plan = OffloadPlan(
        disk_path=disk_path,
        device_bytes=0,
        host_bytes=0,
        workspace_bytes=0,
        precision=precision,
        compression=compression,
    )
    kernels = select_kernels("auto", torch_dtype(dtype), "cpu", default_cache_dir() / "kernels")
    adapter = kernel_adapter(plan)
    adapted = adapter(kernels) if adapter else kernels
    arch = arch_from_hf(json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8")))
    request = StoreRequest(
        model_path=model_path,
        units=weight_units(arch, rank, size),
        dtype=dtype,
        packer=make_packer(adapted, torch_dtype(dtype)),
        disk_path=disk_path,
        rank=rank,
        size=size,
        codec=codec_of(plan, dtype, default_cache_dir() / "kernels"),
    )
    return ensure_store(request, on_progress)
