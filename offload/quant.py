"""Group-wise int8 and int4 weights: how they are made, how they lie, and what they mean. Torch.

`GROUP` inputs of one output row share a scale and a minimum, both bf16:

    weight = fp32(code) x fp32(scale) + fp32(minimum), rounded once to the model's dtype

Code x scale is exact in fp32 (8 bits x 8 bits), so fused and separate arithmetic give the same
bits, on every processor. The scale is rounded up and the minimum down: no weight lies outside the
codes' reach, and the error is at most half a (rounded) step plus the last rounding.

Codes lie in lines of elements that lie side by side in the layout computed with (`CodeLayout`);
int4 packs line element i into the low and i + half a line into the high four bits of byte i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.base.errors import InternalError
from offload.precision import GROUP, Precision

SCALES = ".scales"
"""Suffix of the tensor with (scale, minimum) of every group."""


def codes_suffix(precision: Precision) -> str:
    """Suffix of the tensor with a quantised weight's codes."""
    return f".{precision.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeLayout:
    """How the elements of a weight (O, I) follow each other.

    Blocks of `width` rows; in a block one line after another, each with `depth` inputs of every
    row: [block][line][row][input]. Rows one after another are width 1, depth `GROUP`.
    """

    width: int
    depth: int

    @property
    def line(self) -> int:
        """Elements of a line."""
        return self.width * self.depth

    def why_not(self, shape: torch.Size) -> str:
        """Why a weight of this shape cannot be quantised in this layout; empty if it can."""
        if self.line % 2 or GROUP % self.depth:
            return f"lines of {self.width} x {self.depth} cannot hold groups of {GROUP}"
        if self.width > 1 and shape[1] % self.depth:
            return f"{shape[1]} inputs are no multiple of {self.depth}"
        return ""

    def num_blocks(self, shape: torch.Size) -> int:
        """Blocks, the last one padded with rows of zeros."""
        return -(-shape[0] // self.width)

    def num_lines(self, shape: torch.Size) -> int:
        """Lines of a block, the last one padded."""
        return -(-shape[1] // self.depth)

    def arrange(self, values_OI: torch.Tensor) -> torch.Tensor:
        """(O, I) -> (blocks, lines, line), padded with zeros; a copy."""
        blocks, lines = self.num_blocks(values_OI.shape), self.num_lines(values_OI.shape)
        padded = values_OI.new_zeros((blocks * self.width, lines * self.depth))
        padded[: values_OI.shape[0], : values_OI.shape[1]] = values_OI
        grid = padded.view(blocks, self.width, lines, self.depth).transpose(1, 2)
        return grid.reshape(blocks, lines, self.line)

    def restore(self, lines_BLE: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Inverse of `arrange`; a copy."""
        blocks, lines = self.num_blocks(shape), self.num_lines(shape)
        grid = lines_BLE.view(blocks, lines, self.width, self.depth).transpose(1, 2)
        rows = grid.reshape(blocks * self.width, lines * self.depth)
        return rows[: shape[0], : shape[1]].contiguous()


ROWS = CodeLayout(width=1, depth=GROUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantisedWeight:
    """One linear weight."""

    precision: Precision
    layout: CodeLayout
    shape: torch.Size
    """(O, I)."""
    codes: torch.Tensor
    """uint8 (blocks, lines, line or half a line)."""
    scales: torch.Tensor
    """bf16 (blocks, groups, 2, width): scale and minimum."""


def quantise(weight_OI: torch.Tensor, precision: Precision, layout: CodeLayout) -> QuantisedWeight:
    """The nearest codes of a finite weight; compute in fp32.

    Raises:
        InternalError: the layout cannot hold the weight (`why_not`), or the format has no codes.
    """
    if precision is Precision.NATIVE or layout.why_not(weight_OI.shape):
        raise InternalError(f"{tuple(weight_OI.shape)} as {precision.value} in {layout}")
    shape = weight_OI.shape
    top = 255 if precision is Precision.INT8 else 15
    groups = -(-shape[1] // GROUP)
    short = groups * GROUP - shape[1]
    wide_OI = weight_OI.float()
    if short:  # repeat the last column: padding must not widen a group
        wide_OI = torch.cat((wide_OI, wide_OI[:, -1:].expand(-1, short)), dim=1)
    grid = wide_OI.view(shape[0], groups, GROUP)
    minimum = _towards(grid.amin(-1), -torch.inf)
    scale = _towards((grid.amax(-1) - minimum.float()) / top, torch.inf)
    steps = (grid - minimum.float()[..., None]) / scale.float().clamp_min(1e-38)[..., None]
    codes_OI = steps.round_().clamp_(0, top).to(torch.uint8).view(shape[0], -1)[:, : shape[1]]
    lines = layout.arrange(codes_OI)
    if precision is Precision.INT4:
        half = layout.line // 2
        lines = lines[..., :half] | (lines[..., half:] << 4)
    return QuantisedWeight(
        precision=precision,
        layout=layout,
        shape=shape,
        codes=lines.contiguous(),
        scales=_arrange_scales(layout, shape, scale, minimum),
    )


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight (O, I) in `dtype`; what every faster way must equal bit by bit."""
    codes = weight.codes
    if weight.precision is Precision.INT4:
        codes = torch.cat((codes & 15, codes >> 4), dim=-1)
    codes_OI = weight.layout.restore(codes, weight.shape)
    scale, minimum = (
        _spread(weight.layout, weight.scales[:, :, part].float(), weight.shape) for part in (0, 1)
    )
    return (codes_OI.float() * scale + minimum).to(dtype)


def _towards(values: torch.Tensor, direction: float) -> torch.Tensor:
    """The bf16 number at or next to each value in `direction`."""
    near = values.to(torch.bfloat16)
    wrong = near.float() < values if direction > 0 else near.float() > values
    return torch.where(wrong, torch.nextafter(near, near.new_tensor(direction)), near)


def _arrange_scales(
    layout: CodeLayout, shape: torch.Size, scale_OG: torch.Tensor, minimum_OG: torch.Tensor
) -> torch.Tensor:
    blocks, groups = layout.num_blocks(shape), scale_OG.shape[1]
    both = scale_OG.new_zeros((2, blocks * layout.width, groups))
    both[0, : shape[0]] = scale_OG
    both[1, : shape[0]] = minimum_OG
    return both.view(2, blocks, layout.width, groups).permute(1, 3, 0, 2).contiguous()


def _spread(layout: CodeLayout, part_BGW: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(blocks, groups, width) -> a value for every weight, (O, I)."""
    rows_OG = part_BGW.transpose(1, 2).reshape(-1, part_BGW.shape[1])[: shape[0]]
    return rows_OG.repeat_interleave(GROUP, dim=1)[:, : shape[1]]
