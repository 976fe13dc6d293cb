"""Which attention backend a rank runs: the first of the table that can, or the one asked for.

Every refusal carries all reasons; the choice is logged. A new backend is one row of the table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from cluster.base.errors import ConfigError
from replicas.attention.backend import AttentionBackend, AttentionSpec
from replicas.attention.cpu import CpuAttention
from replicas.attention.cpu_paged import CpuPagedAttention
from replicas.attention.flashinfer import FlashInferAttention
from replicas.attention.torch_ref import TorchReferenceAttention
from replicas.attention.triton_paged import TritonPagedAttention
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    name: str
    why_not: Callable[[AttentionSpec, Kernels], list[str]]
    build: Callable[[AttentionSpec, Kernels], AttentionBackend]
    by_name_only: bool = False
    """Its rows may depend on what runs beside them: nobody gets that unasked."""


def _why_not_paged(spec: AttentionSpec, kernels: Kernels) -> list[str]:
    missing = [] if isinstance(kernels, CpuKernels) else ["there are no compiled kernels"]
    return CpuPagedAttention.why_not(spec) + missing


def _paged(spec: AttentionSpec, kernels: Kernels) -> AttentionBackend:
    if not isinstance(kernels, CpuKernels):
        raise ConfigError("There are no compiled kernels.", param="attention_backend")
    return CpuPagedAttention(spec, kernels.library)


_BACKENDS = (
    _Row(name=CpuPagedAttention.name, why_not=_why_not_paged, build=_paged),
    _Row(
        name=CpuAttention.name,
        why_not=lambda spec, _: CpuAttention.why_not(spec),
        build=lambda spec, _: CpuAttention(spec),
    ),
    _Row(
        name=TritonPagedAttention.name,
        why_not=lambda spec, _: TritonPagedAttention.why_not(spec),
        build=lambda spec, _: TritonPagedAttention(spec),
    ),
    _Row(
        name=FlashInferAttention.name,
        why_not=lambda spec, _: FlashInferAttention.why_not(spec),
        build=lambda spec, _: FlashInferAttention(spec),
        by_name_only=True,
    ),
    _Row(
        name=TorchReferenceAttention.name,
        why_not=lambda spec, _: TorchReferenceAttention.why_not(spec),
        build=lambda spec, _: TorchReferenceAttention(spec),
    ),
)
BACKEND_NAMES = tuple(backend.name for backend in _BACKENDS)
_log = logging.getLogger(__name__)


def select_backend(
    spec: AttentionSpec, requested: str = "auto", kernels: Kernels = TORCH_KERNELS
) -> AttentionBackend:
    """A backend for `spec`.

    Args:
        requested: `auto` (fastest first) or a backend's name.
        kernels: what the model computes with; a backend may need compiled ones.

    Raises:
        ConfigError: unknown name, or no backend that can run `spec`; states every reason.
    """
    candidates = [
        item
        for item in _BACKENDS
        if requested == item.name or (requested == "auto" and not item.by_name_only)
    ]
    if not candidates:
        raise ConfigError(
            f"There is no attention backend {requested!r}.",
            f"Use auto or one of: {', '.join(BACKEND_NAMES)}.",
            param="attention_backend",
        )
    refusals: list[str] = []
    for backend in candidates:
        reasons = backend.why_not(spec, kernels)
        if not reasons:
            passed_over = f"; passed over {'; '.join(refusals)}" if refusals else ""
            _log.info("attention backend %s (%s)%s", backend.name, requested, passed_over)
            return backend.build(spec, kernels)
        refusals.append(f"{backend.name}: {', '.join(reasons)}")
    raise ConfigError(
        f"No attention backend can run {spec}.",
        f"Reasons: {'; '.join(refusals)}.",
        param="attention_backend",
    )
