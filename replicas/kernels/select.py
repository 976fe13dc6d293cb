"""Which kernels a rank runs. Going without is never an error: one log line says what and why."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from cluster.base.errors import ConfigError
from moe.row_moves import RowWork
from replicas.kernels.build import BuildPlan, KernelsUnavailableError, build_library, find_compiler
from replicas.kernels.cpu_draws import CpuDraws
from replicas.kernels.cpu_ops import CpuKernels
from replicas.kernels.cpu_row_moves import CpuRowMoves
from replicas.kernels.cpu_row_sums import CpuRowSums
from replicas.kernels.loader import CpuLibrary, TilesRefusedError
from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.kernels.triton_ops import TritonKernels

CHOICES = ("auto", "native", "off", "triton", "fp8")
_log = logging.getLogger(__name__)


def select_kernels(requested: str, dtype: torch.dtype, device: str, cache_dir: Path) -> Kernels:
    """The fastest kernels that can serve the model, else torch's.

    Args:
        requested: `auto`; `native` (compiled or Triton's, never torch's); `off` (torch's);
            `triton`; or `fp8` (Triton's, linear weights in fp8).
        cache_dir: where compiled libraries are kept; made when missing.

    Raises:
        ConfigError: there is no such choice, or what was asked for by name cannot run here.
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
    if requested in ("triton", "fp8"):
        return _triton(requested, dtype, device)
    if device.split(":")[0] == "cpu":
        return _compiled(dtype, device, cache_dir, or_torch=requested == "auto")
    if requested == "native":
        return _triton("triton", dtype, device)
    if reasons := TritonKernels.why_not(dtype, device):
        _log.warning("kernels: torch, because of Triton's: %s", "; ".join(reasons))
        return TORCH_KERNELS
    return _triton("triton", dtype, device)


def select_row_work(cache_dir: Path) -> RowWork:
    """What plans, takes apart and adds rows that travel between ranks: compiled, else torch's."""
    try:
        library = _library(cache_dir)
    except KernelsUnavailableError as error:
        _log.warning("rows between ranks: torch, because %s", error)
        return RowWork()
    return RowWork(moves=CpuRowMoves(library), sums=CpuRowSums(library))


def compiled_draws(kernels: Kernels) -> CpuDraws | None:
    """The sampler that comes with a set of kernels; None: torch samples."""
    return CpuDraws(kernels.library) if isinstance(kernels, CpuKernels) else None


def _triton(requested: str, dtype: torch.dtype, device: str) -> Kernels:
    if reasons := TritonKernels.why_not(dtype, device, fp8=requested == "fp8"):
        raise ConfigError(
            f"Triton's kernels cannot run here: {'; '.join(reasons)}.",
            "Use kernels auto.",
            param="kernels",
        )
    kernels = TritonKernels(fp8=requested == "fp8")
    _log.info("kernels: %s", kernels.name)
    return kernels


def _compiled(dtype: torch.dtype, device: str, cache_dir: Path, *, or_torch: bool) -> Kernels:
    why = "; ".join(CpuKernels.why_not(dtype, device))
    if not why:
        try:
            library = _library(cache_dir)
        except KernelsUnavailableError as error:
            why = str(error)
        else:
            _log.info("kernels: compiled, %s", library.isa)
            return CpuKernels(library)
    if not or_torch:
        raise ConfigError(
            f"The compiled kernels cannot run here: {why}.",
            "Put that right, or use kernels auto or torch.",
            param="kernels",
        )
    _log.warning("kernels: torch, because %s", why)
    return TORCH_KERNELS


def _library(cache_dir: Path) -> CpuLibrary:
    """For all that this processor can, or without matrix tiles where the system keeps those."""
    compiler = find_compiler()
    try:
        return CpuLibrary(build_library(BuildPlan(compiler=compiler), cache_dir))
    except TilesRefusedError as error:
        _log.info("kernels: %s", error)
        plan = BuildPlan(compiler=compiler, without_tiles=True)
        return CpuLibrary(build_library(plan, cache_dir))
