"""What lies in a record for a linear weight: decided by the kernels that compute with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from replicas.kernels.ops import Kernels

# Shapes that no block size divides, and one that all do: a layout shows in the bytes it makes.
_PROBE_SHAPES = ((67, 131), (128, 256))


class Packer(Protocol):
    """Decides what lies in a record for each tensor of a unit."""

    layout: str
    """Changes with the bytes that `pack` makes of the same tensor."""

    def pack(self, unit: str, name: str, weight_OI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """The tensors that stand for the linear weight `name` of `unit`, by what is added to it.

        One on the meta device has no bytes and tells dtype and shape.
        """
        ...


class NativePacker:
    """Linear weights in the layout of `kernels`, in their own dtype."""

    def __init__(self, kernels: Kernels, dtype: torch.dtype) -> None:
        self._kernels = kernels
        self.layout = layout_digest(kernels.name, lambda probe: kernels.pack("", probe), dtype)

    def pack(self, unit: str, name: str, weight_OI: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """See `Packer`."""
        return self._kernels.pack("", weight_OI)


def layout_digest(
    name: str, pack: Callable[[torch.Tensor], Mapping[str, torch.Tensor]], dtype: torch.dtype
) -> str:
    """Changes with the bytes that `pack` makes of a few weights in `dtype`."""
    digest = hashlib.sha256(name.encode())
    for rows, width in _PROBE_SHAPES:
        probe = torch.arange(rows * width).remainder(251).view(rows, width).to(dtype)
        for suffix, tensor in pack(probe).items():
            digest.update(f"{suffix} {tuple(tensor.shape)} ".encode())
            if not tensor.is_meta:
                digest.update(bytes_of(tensor))
    return digest.hexdigest()[:16]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, one after another."""
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data
