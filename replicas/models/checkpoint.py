"""Safetensors -> the tensors of one rank, reading only the slices that its specs name.

Every tensor of the checkpoint has to be used and every one that is needed has to be there; names,
shapes, dtypes and finiteness are checked, and each complaint names file, tensor, expected and
found. No pickle, no code from the checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster.base.errors import CorruptWeightsError
from replicas.kernels.ops import Kernels
from replicas.kernels.torch_ops import TORCH_KERNELS
from replicas.layers.weights import ResidentWeights, Source, TensorSpec, WeightUnit
from replicas.models.checkpoint_files import StoredTensor, read_index
from replicas.models.context import torch_dtype

ProgressCallback = Callable[[int, int], None]
"""(bytes loaded so far, bytes in all) of this rank."""

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_BUFFERS = re.compile(
    r"rotary_emb\.inv_freq$|^(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)$"
)  # constants that old checkpoints carry; recomputed, never read
_PREFIXES = (("model.decoder.", "decoder."), ("transformer.", ""), ("model.", ""))
"""Names as a causal-LM class saves them, and as the bare base model does."""


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
    stored = _canonical(units, read_index(path))
    _check_names(Path(path), units, stored)
    with ExitStack() as files:
        loader = _Loader(stored, torch_dtype(dtype), device, files)
        return _load_all(units, loader, kernels, on_progress)


@contextmanager
def open_checkpoint(
    path: str | Path, units: Iterable[WeightUnit], *, dtype: str
) -> Iterator[Callable[[TensorSpec], torch.Tensor]]:
    """Reads one spec's tensor after another on the CPU; for who keeps weights in another way.

    Raises:
        ConfigError, CorruptWeightsError: as `load_weights`, here and at each read.
    """
    units = tuple(units)
    stored = _canonical(units, read_index(path))
    _check_names(Path(path), units, stored)
    with ExitStack() as files:
        yield _Loader(stored, torch_dtype(dtype), "cpu", files).load


def load_unit(
    path: str | Path, unit: WeightUnit, *, dtype: str, kernels: Kernels = TORCH_KERNELS
) -> dict[str, torch.Tensor]:
    """One more unit of a checkpoint that has been loaded before, on the CPU, laid out alike.

    Raises:
        ConfigError, CorruptWeightsError: as `load_weights`; the files may have changed since.
    """
    stored = _canonical((unit,), read_index(path))
    names = {source.name for spec in unit.tensors for source in spec.sources}
    if missing := names - set(stored):
        raise CorruptWeightsError(f"{path}: {_naming('missing', missing)}.")
    tensors: dict[str, torch.Tensor] = {}
    with ExitStack() as files:
        loader = _Loader(stored, torch_dtype(dtype), "cpu", files)
        for spec in unit.tensors:
            local = loader.load(spec)
            parts = kernels.pack("", local) if spec.is_linear else {"": local}
            tensors |= {spec.name + suffix: tensor for suffix, tensor in parts.items()}
    return tensors


def _load_all(
    units: tuple[WeightUnit, ...],
    loader: _Loader,
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


class _Loader:
    """Reads specs from open files; lives as long as the `ExitStack` it was given."""

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        device: str,
        files: ExitStack,
    ) -> None:
        self._dtype = dtype
        self._stored = stored
        self._device = device
        self._files = files
        self._open: dict[Path, Any] = {}

    def dtype_of(self, spec: TensorSpec) -> torch.dtype:
        """What the spec's tensor is kept in."""
        return self._dtype if spec.dtype is None else torch_dtype(spec.dtype)

    def load(self, spec: TensorSpec) -> torch.Tensor:
        """The spec's local tensor."""
        local = torch.empty(spec.shape, dtype=self.dtype_of(spec))
        row = 0
        for source, full_shape in zip(spec.sources, spec.full_shapes, strict=True):
            piece = self._read(source, full_shape, spec.duplicates)
            local[row : row + piece.shape[0]] = piece
            row += piece.shape[0]
        local[row:] = 0
        if not torch.isfinite(local).all():
            names = ", ".join(source.name for source in spec.sources)
            raise CorruptWeightsError(f"{names} overflows {local.dtype}.", "Choose a wider dtype.")
        return local.to(self._device)

    def _read(
        self, source: Source, full_shape: tuple[int, ...], duplicates: tuple[str, ...]
    ) -> torch.Tensor:
        present = [name for name in (source.name, *duplicates) if name in self._stored]
        first, *copies = [self._slice(name, source, full_shape) for name in present]
        for name, copy in zip(present[1:], copies, strict=True):
            if not torch.equal(first, copy):
                raise CorruptWeightsError(
                    f"{self._stored[name].file}: the configuration ties {name} to {present[0]}, "
                    "but the checkpoint holds different values for the two.",
                    "Set tie_word_embeddings to false in config.json.",
                )
        return first.t() if source.transpose else first

    def _slice(self, name: str, source: Source, full_shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._stored[name]
        where = f"{tensor.file}: tensor {name}"
        if tensor.shape != full_shape:
            raise CorruptWeightsError(
                f"{where} has shape {list(tensor.shape)}; "
                f"the configuration needs {list(full_shape)}.",
                "Check that config.json belongs to these weights.",
            )
        if tensor.dtype not in _FLOAT_DTYPES:
            raise CorruptWeightsError(
                f"{where} is {tensor.dtype}; expected one of {', '.join(_FLOAT_DTYPES)}.",
                "Quantised checkpoints are not supported.",
            )
        try:
            piece = _cut(self._file(tensor.file).get_slice(tensor.name), source, len(full_shape))
        except (SafetensorError, OSError) as error:
            raise CorruptWeightsError(f"{where} cannot be read ({error}).") from error
        if not torch.isfinite(piece).all():
            raise CorruptWeightsError(f"{where} holds NaN or infinite values; expected finite.")
        return piece

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            opened = safe_open(str(file), framework="pt", device="cpu")
            self._open[file] = self._files.enter_context(opened)
        return self._open[file]


def _cut(stored: Any, source: Source, num_axes: int) -> torch.Tensor:
    """The source's rectangle of a stored tensor; steps are taken after reading what they span."""
    cuts = [slice(None)] * num_axes
    stacked = 0
    if source.index is not None:
        cuts[0], stacked = slice(source.index, source.index + 1), 1
    cuts[source.dim + stacked] = slice(source.start, source.stop)
    piece: torch.Tensor = stored[tuple(cuts)]
    piece = piece.squeeze(0) if stacked else piece
    if source.step == 1:
        return piece
    every = [slice(None)] * piece.dim()
    every[source.dim] = slice(None, None, source.step)
    return piece[tuple(every)]


def _canonical(
    units: tuple[WeightUnit, ...], stored: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The checkpoint under the names that the specs use."""
    wanted = [source.name for unit in units for spec in unit.tensors for source in spec.sources]
    wanted += [name for unit in units for name in unit.unused]
    used = [prefix for prefix in _PREFIXES if any(name.startswith(prefix[0]) for name in wanted)]
    for full, short in used[:1]:
        if not any(name.startswith(full) for name in stored):
            longer = {short + name.removeprefix(full): name for name in wanted}
            return {longer.get(name, name): tensor for name, tensor in stored.items()}
    return dict(stored)


def _check_names(
    root: Path, units: tuple[WeightUnit, ...], stored: Mapping[str, StoredTensor]
) -> None:
    """Every needed name is there and nothing else is."""
    missing: set[str] = set()
    used: set[str] = set()
    for spec in (spec for unit in units for spec in unit.tensors):
        used.update(spec.duplicates)
        for source in spec.sources:
            used.add(source.name)
            if not any(name in stored for name in (source.name, *spec.duplicates)):
                missing.add(source.name)
    unused = [name for unit in units for name in unit.unused]
    used.update(name for name in unused if not name.endswith("."))
    prefixes = tuple(name for name in unused if name.endswith("."))
    unexpected = {
        name
        for name in stored
        if name not in used and not name.startswith(prefixes) and not _BUFFERS.search(name)
    }
    if missing or unexpected:
        complaints = [_naming("missing", missing), _naming("unexpected", unexpected)]
        raise CorruptWeightsError(
            f"{root}: {'; '.join(filter(None, complaints))}.",
            "Check that config.json belongs to these weights.",
        )


def _naming(what: str, names: set[str], shown: int = 8) -> str:
    if not names:
        return ""
    listed = sorted(names)
    rest = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return f"{len(listed)} {what} tensors: {', '.join(listed[:shown])}{rest}"
