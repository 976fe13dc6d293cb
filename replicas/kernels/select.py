"""Which kernels a rank runs. Going without is never an error: one log line says what and why."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from cluster.base.errors import ConfigError
from replicas.kernels.build import BuildPlan, KernelsUnavailableError, build_library, find_compiler
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.loader import CpuLibrary
from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS

CHOICES = ("auto", "off")
_log = logging.getLogger(__name__)


def select_kernels(requested: str, dtype: torch.dtype, device: str, cache_dir: Path) -> Kernels:
    """Compiled kernels where they can serve the model, else torch's.

    Args:
        requested: `auto` or `off`.
        cache_dir: where compiled libraries are kept; made when missing.

    Raises:
        ConfigError: `requested` is neither.
    """
    if requested not in CHOICES:
        raise ConfigError(
            f"There is no choice of kernels {requested!r}.",
            f"Use one of {', '.join(CHOICES)}.",
            param="kernels",
        )
    if requested == "off":
        _log.info("kernels: torch (switched off)")
        return TORCH_KERNELS
    if reasons := CpuKernels.why_not(dtype, device):
        _log.info("kernels: torch, because of the compiled ones: %s", "; ".join(reasons))
        return TORCH_KERNELS
    try:
        library = CpuLibrary(build_library(BuildPlan(compiler=find_compiler()), cache_dir))
    except KernelsUnavailableError as error:
        _log.warning("kernels: torch, because %s", error)
        return TORCH_KERNELS
    _log.info("kernels: compiled, %s", library.isa)
    return CpuKernels(library)
