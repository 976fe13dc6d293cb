"""Small seeded checkpoints with quantised weights, as published ones store them, and their oracle.

`EncodedCheckpoint.plain` holds the same weights after transformers' own dequantisation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.support.tiny_models import write_checkpoint

Tensors = dict[str, torch.Tensor]
_FP8_MAX = 448.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedCheckpoint:
    """One checkpoint, twice."""

    path: Path
    plain: Path


def write_mxfp4(root: Path) -> EncodedCheckpoint:
    """GPT-OSS with its experts in MXFP4, all else in bfloat16."""
    source = write_checkpoint("gpt_oss", root / "source")
    tensors = {name: tensor.bfloat16() for name, tensor in _tensors(source).items()}
    generator = torch.Generator().manual_seed(7)
    encoded, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        experts, inputs, outputs = tensor.shape
        shape = (experts, outputs, inputs // 32, 16)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.randint(119, 125, shape[:3], dtype=torch.uint8, generator=generator)
        del encoded[name]
        encoded |= {f"{name}_blocks": codes, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(codes, scales)
    section = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return EncodedCheckpoint(
        path=_write(source, root / "encoded", encoded, section),
        plain=_write(source, root / "plain", plain, None),
    )


def write_fp8(
    root: Path,
    name: str,
    section: Mapping[str, Any],
    *,
    block: tuple[int, int] | None,
    suffix: str,
    scale_dtype: torch.dtype = torch.float32,
) -> EncodedCheckpoint:
    """A family with its projections in FP8, all else in bfloat16.

    Args:
        section: the configuration's `quantization_config`.
        block: rows and columns of a scale; (0, 0): one for the tensor; None: one for each row.
        suffix: what scales are called behind the name of their weight.
    """
    source = write_checkpoint(name, root / "source")
    encoded, plain = {}, {}
    for key, tensor in _tensors(source).items():
        if tensor.dim() != 2 or "_proj" not in key:
            encoded[key] = plain[key] = tensor.bfloat16()
            continue
        rows, columns = tensor.shape
        height, width = (1, columns) if block is None else (block[0] or rows, block[1] or columns)
        codes, scales = fp8_blocks(tensor, height, width, scale_dtype)
        encoded |= {key: codes, key + suffix: scales.reshape(1) if block == (0, 0) else scales}
        plain[key] = dequantised_fp8(codes, scales, height, width)
    return EncodedCheckpoint(
        path=_write(source, root / "encoded", encoded, section),
        plain=_write(source, root / "plain", plain, None),
    )


def fp8_blocks(
    weight_OI: torch.Tensor, height: int, width: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of blocks; the last ones of a row or column may be cut short."""
    rows, columns = weight_OI.shape
    scales = torch.empty(-(-rows // height), -(-columns // width), dtype=scale_dtype)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for down in range(scales.shape[0]):
        for right in range(scales.shape[1]):
            where = (
                slice(down * height, (down + 1) * height),
                slice(right * width, (right + 1) * width),
            )
            block = weight_OI[where].float()
            scales[down, right] = block.abs().max() / _FP8_MAX
            scaled = block / scales[down, right].float()
            codes[where] = scaled.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return codes, scales


def dequantised_fp8(
    codes: torch.Tensor, scales: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """By transformers, in float32; it wants whole blocks, so where one is cut short each alone."""
    dequantise = Fp8Dequantize(None)._dequantize_one
    if codes.shape[0] % height == 0 and codes.shape[1] % width == 0:
        whole: torch.Tensor = dequantise(codes, scales, torch.float32)
        return whole
    values = torch.empty(codes.shape)
    for down in range(scales.shape[0]):
        for right in range(scales.shape[1]):
            rows = slice(down * height, (down + 1) * height)
            columns = slice(right * width, (right + 1) * width)
            scale = scales[down : down + 1, right : right + 1]
            values[rows, columns] = dequantise(codes[rows, columns], scale, torch.float32)
    return values


def _tensors(source: Path) -> Tensors:
    return load_file(source / "model.safetensors")


def _write(source: Path, target: Path, tensors: Tensors, section: Mapping[str, Any] | None) -> Path:
    target.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    if section is not None:
        config["quantization_config"] = dict(section)
    (target / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    return target
