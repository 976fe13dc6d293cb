"""Routed experts of one layer: the grouped kernels against one expert after another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional

from bench.gpu.cases import Case, Lab, Setting, one
from bench.gpu.ceilings import seconds
from bench.report import Row, compared, measured
from moe.experts import DOWN, UP
from replicas.kernels.expert_ops import ExpertSet
from replicas.kernels.triton_experts import TritonExperts
from replicas.models.context import torch_dtype

_TOKENS = (1, 16, 128, 1024)
_TOP_K = 8


def mixture_cases(setting: Setting) -> list[Case]:
    """One case per number of tokens; 64 experts of Qwen3-MoE's shape."""
    return [
        Case(
            name=f"experts-{tokens}",
            about_s=10.0 if index == 0 else 3.0,
            run=partial(_block, tokens),
        )
        for index, tokens in enumerate(_TOKENS[:2] if setting.is_tiny else _TOKENS)
    ]


def _block(tokens: int, lab: Lab) -> Iterator[Row]:
    experts, dim, ffn = (8, 64, 32) if lab.setting.is_tiny else (64, 2048, 768)
    dtype = torch_dtype(lab.setting.dtype)
    generator = torch.Generator(device=lab.device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=lab.device)
        return made.normal_(std=shape[-1] ** -0.5, generator=generator)

    tensors = tuple({UP: random(2 * ffn, dim), DOWN: random(dim, ffn)} for _ in range(experts))
    hidden_TD = random(tokens, dim)
    scores = torch.rand((tokens, experts), device=lab.device, generator=generator)
    weight_TK, slot_TK = scores.softmax(-1).topk(min(_TOP_K, experts // 2), dim=-1)
    grouped = TritonExperts(ExpertSet(tensors=tensors, held=tuple(range(experts)), down_bias=False))
    expected_TD = _one_by_one(hidden_TD, slot_TK, weight_TK, tensors)
    actual_TD = grouped.forward(hidden_TD, slot_TK, weight_TK)
    error = float((actual_TD.float() - expected_TD).norm() / expected_TD.norm())
    if not error < 0.02:
        raise AssertionError(f"the grouped kernels are {error:.1%} off")
    ours_s = seconds(lambda: grouped.forward(hidden_TD, slot_TK, weight_TK), lab.device, 10)
    theirs_s = seconds(lambda: _one_by_one(hidden_TD, slot_TK, weight_TK, tensors), lab.device, 10)
    row = measured(f"{experts} experts, {tokens} tokens", "time", "ms", one(ours_s * 1e3))
    yield compared(row, "one by one", one(theirs_s * 1e3), lower_is_better=True)


def _one_by_one(
    hidden_TD: torch.Tensor,
    slot_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    tensors: tuple[dict[str, torch.Tensor], ...],
) -> torch.Tensor:
    """As transformers' eager loop: the visited experts, each with its rows; fp32 sums."""
    output_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32, device=hidden_TD.device)
    for expert in sorted(set(slot_TK.flatten().tolist())):
        row, place = (slot_TK == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(hidden_TD[row], tensors[expert][UP]).chunk(2, dim=-1)
        part = functional.linear(functional.silu(gate) * up, tensors[expert][DOWN])
        output_TD.index_add_(0, row, part.float() * weight_TK[row, place, None])
    return output_TD
