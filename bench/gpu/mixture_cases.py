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
from moe.layout import AllHere
from replicas.kernels.expert_ops import ExpertSet
from replicas.kernels.triton_experts import TritonExperts
from replicas.models.context import torch_dtype
from replicas.worker.host_stage import seen_from

_TOKENS = (1, 16, 128, 1024)
_TOP_K = 8
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden states, experts and gate weights."""


def mixture_cases(setting: Setting) -> list[Case]:
    """One case per number of tokens; 64 experts of Qwen3-MoE's shape."""
    return [
        Case(
            name=f"experts-{tokens}",
            about_s=10.0 if index == 0 else 3.0,
            run=partial(_block, tokens),
        )
        for index, tokens in enumerate(_TOKENS[:2] if setting.is_tiny else _TOKENS)
    ] + [
        Case(name=f"experts-staged-{tokens}", about_s=5.0, run=partial(_staged, tokens))
        for tokens in (_TOKENS[1:2] if setting.is_tiny else _TOKENS[1:3])
    ]


def _layer(tokens: int, lab: Lab) -> tuple[tuple[dict[str, torch.Tensor], ...], Rows]:
    """Random experts and routed rows."""
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
    return tensors, (hidden_TD, slot_TK, weight_TK)


def _grouped(tensors: tuple[dict[str, torch.Tensor], ...]) -> TritonExperts:
    held = tuple(range(len(tensors)))
    return TritonExperts(ExpertSet(tensors=tensors, held=held, down_bias=False))


def _staged(tokens: int, lab: Lab) -> Iterator[Row]:
    """What a rank of an expert-parallel replica adds to a layer: its rows through pinned memory."""
    tensors, rows = _layer(tokens, lab)
    grouped, experts = _grouped(tensors), len(tensors)
    layout = seen_from(lab.device, AllHere({0: experts}))

    def through_the_host() -> torch.Tensor:
        exchange = layout.exchange(0)
        arrived = exchange.dispatch(*rows).wait()
        summed_AD = grouped.forward(arrived.hidden_AD, arrived.slot_AK, arrived.weight_AK)
        return exchange.combine(summed_AD, arrived)

    if not torch.equal(through_the_host(), grouped.forward(*rows).float()):
        raise AssertionError("rows that passed through the host gave other sums")
    ours_s = seconds(through_the_host, lab.device, 10)
    there_s = seconds(lambda: grouped.forward(*rows).float(), lab.device, 10)
    name = f"{experts} experts, {tokens} tokens through the host"
    row = measured(name, "time", "ms", one(ours_s * 1e3))
    yield compared(row, "on the device", one(there_s * 1e3), lower_is_better=True)


def _block(tokens: int, lab: Lab) -> Iterator[Row]:
    tensors, (hidden_TD, slot_TK, weight_TK) = _layer(tokens, lab)
    grouped, experts = _grouped(tensors), len(tensors)
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
