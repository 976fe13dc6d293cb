"""Reads single tensors of one rank from open safetensors files: slices, conversion, checks.

Names, shapes, dtypes and finiteness are checked, and each complaint names file, tensor, expected
and found. No pickle, no code from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cluster.base.errors import CorruptWeightsError
from replicas.layers.weights import Source, TensorSpec
from replicas.models.checkpoint_files import StoredTensor
from replicas.models.context import torch_dtype
from replicas.models.decoding import all_finite, decoded, spanned
from replicas.models.positional_file import PositionalFile
from replicas.models.weight_encoding import EncodedTensor

_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


class TensorReader:
    """Reads specs from open files; lives as long as the `ExitStack` it was given.

    Raises (every method): CorruptWeightsError for anything about the files that does not match.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        dtype: torch.dtype,
        device: str,
        files: ExitStack,
        *,
        is_mapped: bool = True,
    ) -> None:
        """Unmapped files (slower) may change while they are open: that ends in an error."""
        self._dtype = dtype
        self._stored = stored
        self._device = device
        self._files = files
        self._is_mapped = is_mapped
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
        if not all_finite(local):
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
        cuts = _cuts(source, full_shape)
        try:
            piece = self._piece(tensor, cuts)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CorruptWeightsError(f"{where} cannot be read ({error}).") from error
        return piece if source.index is None else piece.squeeze(0)

    def _piece(self, tensor: StoredTensor, cuts: tuple[slice, ...]) -> torch.Tensor:
        """A rectangle of the tensor; plain ones in the stored dtype."""
        if isinstance(tensor, EncodedTensor):
            return decoded(tensor, cuts, self._dtype, self._file)
        where = f"{tensor.file}: tensor {tensor.name}"
        if tensor.dtype not in _FLOAT_DTYPES:
            raise CorruptWeightsError(
                f"{where} is {tensor.dtype}; expected one of {', '.join(_FLOAT_DTYPES)}.",
                "Use a checkpoint whose config.json tells how it is quantised "
                "(quantization_config), or one with plain weights.",
            )
        piece = spanned(self._file(tensor.file).get_slice(tensor.name), cuts)
        if not all_finite(piece):
            raise CorruptWeightsError(f"{where} holds NaN or infinite values; expected finite.")
        return piece

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            mapped = safe_open(str(file), framework="pt", device="cpu") if self._is_mapped else None
            self._open[file] = self._files.enter_context(mapped or PositionalFile(file))
        return self._open[file]


def _cuts(source: Source, full_shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The source's rectangle of the stored tensor, a slice for each of its axes."""
    cuts = [slice(None)] * len(full_shape)
    stacked = 0
    if source.index is not None:
        cuts[0], stacked = slice(source.index, source.index + 1), 1
    cuts[source.dim + stacked] = slice(source.start, source.stop, source.step)
    return tuple(cuts)
