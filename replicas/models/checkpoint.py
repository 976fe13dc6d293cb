"""Safetensors -> the tensors of one rank, reading only the slices that its specs name.

Every tensor of the checkpoint has to be used and every one that is needed has to be there; names,
shapes, dtypes and finiteness are checked, and each complaint names file, tensor, expected and
found. No pickle, no code from the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from cluster.base.errors import CorruptWeightsError
from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.layers.weights import ResidentWeights, TensorSpec, WeightUnit
from replicas.models.checkpoint_files import StoredTensor, read_index
from replicas.models.checkpoint_names import canonical, check_names, naming
from replicas.models.context import torch_dtype
from replicas.models.hf_encoding import read_encoding
from replicas.models.tensor_reader import TensorReader
from replicas.models.weight_encoding import fold_encoded

ProgressCallback = Callable[[int, int], None]
"""(bytes loaded so far, bytes in all) of this rank."""


def load_weights(
    path: str | Path,
    units: Iterable[WeightUnit],
    *,
    dtype: str,
    device: str,
    kernels: Kernels = TORCH_KERNELS,
    on_progress: ProgressCallback | None = None,
) -> ResidentWeights:
    """This rank's weights, in `dtype` on `device`.

    Specs that ask for the same slices (tied embeddings) share one tensor. Linear weights are laid
    out for `kernels` one by one, so at most one is in memory twice.

    Raises:
        ConfigError: no safetensors checkpoint at `path`, or unknown dtype.
        CorruptWeightsError: anything about the files that does not match the specs.
    """
    units = tuple(units)
    stored = _stored(units, path)
    check_names(Path(path), units, stored)
    with ExitStack() as files:
        loader = TensorReader(stored, torch_dtype(dtype), device, files)
        return _load_all(units, loader, kernels, on_progress)


@contextmanager
def open_checkpoint(
    path: str | Path, units: Iterable[WeightUnit], *, dtype: str, is_mapped: bool = True
) -> Iterator[Callable[[TensorSpec], torch.Tensor]]:
    """Reads one spec's tensor after another on the CPU; for who keeps weights in another way.

    Who keeps it open while serving leaves the files unmapped: a mapped file that is cut short
    would end the process.

    Raises:
        ConfigError, CorruptWeightsError: as `load_weights`, here and at each read.
    """
    units = tuple(units)
    stored = _stored(units, path)
    check_names(Path(path), units, stored)
    with ExitStack() as files:
        yield TensorReader(stored, torch_dtype(dtype), "cpu", files, is_mapped=is_mapped).load


def load_unit(
    path: str | Path, unit: WeightUnit, *, dtype: str, kernels: Kernels = TORCH_KERNELS
) -> dict[str, torch.Tensor]:
    """One more unit of a checkpoint that has been loaded before, on the CPU, laid out alike.

    Raises:
        ConfigError, CorruptWeightsError: as `load_weights`; the files may have changed since.
    """
    stored = _stored((unit,), path)
    names = {source.name for spec in unit.tensors for source in spec.sources}
    if missing := names - set(stored):
        raise CorruptWeightsError(f"{path}: {naming('missing', missing)}.")
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as files:
        loader = TensorReader(stored, torch_dtype(dtype), "cpu", files, is_mapped=False)
        for spec in unit.tensors:
            local = loader.load(spec)
            parts = kernels.pack("", local) if spec.is_linear else {"": local}
            tensors |= {spec.name + suffix: tensor for suffix, tensor in parts.items()}
    return tensors


def _load_all(
    units: tuple[WeightUnit, ...],
    loader: TensorReader,
    kernels: Kernels,
    on_progress: ProgressCallback | None,
) -> ResidentWeights:
    distinct = {_identity(spec): spec for unit in units for spec in unit.tensors}
    total = sum(
        math.prod(spec.shape) * loader.dtype_of(spec).itemsize for spec in distinct.values()
    )
    done = 0
    linear = {_identity(spec) for unit in units for spec in unit.tensors if spec.is_linear}
    loaded: dict[object, dict[str, torch.Tensor]] = {}
    for identity, spec in distinct.items():
        local = loader.load(spec)
        done += local.nbytes
        loaded[identity] = kernels.pack("", local) if identity in linear else {"": local}
        if on_progress is not None:
            on_progress(done, total)
    return ResidentWeights(
        {
            unit.name: {
                spec.name + suffix: tensor
                for spec in unit.tensors
                for suffix, tensor in loaded[_identity(spec)].items()
            }
            for unit in units
        }
    )


def _identity(spec: TensorSpec) -> object:
    return spec.shape, spec.sources, spec.dtype


def _stored(units: tuple[WeightUnit, ...], path: str | Path) -> dict[str, StoredTensor]:
    """The checkpoint under the names that the specs use, quantised weights as one tensor each."""
    return canonical(units, fold_encoded(read_index(path), read_encoding(Path(path))))
