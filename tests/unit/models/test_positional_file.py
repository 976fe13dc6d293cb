"""Positioned reads give what the format's own reader gives, and errors where a mapping crashes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from replicas.models.positional_file import PositionalFile

CUTS = [
    (slice(None), slice(None)),
    (slice(1, 3), slice(None)),
    (slice(2, 2), slice(None)),
    (slice(None), slice(2, 5)),
    (slice(4, None), slice(None, 1)),
]


def stored_file(tmp_path: Path) -> Path:
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    tensors = {
        "float32": values,
        "bfloat16": values.bfloat16(),
        "codes": values.to(torch.float8_e4m3fn),
        "counts": (values * 9).to(torch.int64),
        "number": values[0, 0].clone(),
        "none": values[:0].clone(),
    }
    save_file(tensors, file := tmp_path / "model.safetensors")
    return file


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    return tensor.dtype, tensor.shape, flat.numpy().tobytes()


def test_tensors_and_slices_are_those_of_a_mapping(tmp_path: Path) -> None:
    file = stored_file(tmp_path)
    with safe_open(file, framework="pt") as mapped, PositionalFile(file) as ours:
        for name in mapped.keys():  # noqa: SIM118 - no mapping, it only has the method
            assert bits(ours.get_tensor(name)) == bits(mapped.get_tensor(name)), name
        for name in ("float32", "bfloat16", "codes", "counts"):
            for cuts in CUTS:
                assert bits(ours.get_slice(name)[cuts]) == bits(mapped.get_slice(name)[cuts])


def test_a_file_that_is_cut_short_while_open_is_an_error(tmp_path: Path) -> None:
    file = stored_file(tmp_path)
    with PositionalFile(file) as ours:
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 1)
        with pytest.raises(OSError, match="ends at byte"):
            [ours.get_tensor(name) for name in ("float32", "bfloat16", "codes", "counts")]
