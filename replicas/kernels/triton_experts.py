"""The routed experts of a layer in Triton: three programs, no host sync, any batch the same bits.

Rows are sorted by expert on the device; the grid has room for the worst split into blocks, and
blocks without rows end at once: the launch depends on shapes alone and can be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.base.errors import InternalError
from moe.exact_sums import BITS, MAX_SHIFT, heaviest
from moe.experts import DOWN, DOWN_BIAS, UP, UP_BIAS
from replicas.kernels.expert_ops import ExpertSet

_ROWS, _COLUMNS, _DEPTH, _STRETCH = 32, 64, 64, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SortedPairs:
    """Pairs by expert, cut into blocks; all on the device.

    Shapes: M all pairs, those that are elsewhere last; B blocks.
    """

    row_M: torch.Tensor
    weight_M: torch.Tensor
    pair_AK: torch.Tensor
    """Where a row's pairs lie, ascending: in the order of their experts."""
    num_here: torch.Tensor
    """One element."""
    block_expert_B: torch.Tensor
    """-1: the block has no rows."""
    block_first_B: torch.Tensor
    block_end_B: torch.Tensor

    @classmethod
    def build(
        cls, place_AK: torch.Tensor, weight_AK: torch.Tensor, num_experts: int
    ) -> SortedPairs:
        """From the place of each pair's expert in the order of sums; `num_experts`: elsewhere."""
        place_M = place_AK.flatten()
        num_pairs, device = place_M.numel(), place_M.device
        order_M = place_M.argsort(stable=True)
        pair_M = torch.empty_like(order_M)
        pair_M[order_M] = torch.arange(num_pairs, device=device)
        experts_E = torch.arange(num_experts, device=device)
        count_E = (place_M == experts_E[:, None]).sum(dim=1)
        end_E = count_E.cumsum(0)
        blocks_E = (count_E + _ROWS - 1) // _ROWS
        block_end_E = blocks_E.cumsum(0)
        num_blocks = min(num_pairs, num_experts + num_pairs // _ROWS)
        block_B = torch.arange(num_blocks, device=device)
        expert_B = torch.searchsorted(block_end_E, block_B, right=True)
        known_B = expert_B.clamp(max=num_experts - 1)
        inside_B = block_B - (block_end_E - blocks_E)[known_B]
        first_B = (end_E - count_E)[known_B] + inside_B * _ROWS
        return cls(
            row_M=order_M // place_AK.shape[1],
            weight_M=weight_AK.flatten()[order_M],
            pair_AK=pair_M.view(place_AK.shape).sort(dim=1).values,
            num_here=end_E[-1:],
            block_expert_B=torch.where(expert_B < num_experts, expert_B, -1),
            block_first_B=first_B,
            block_end_B=torch.minimum(first_B + _ROWS, end_E[known_B]),
        )


class TritonExperts:
    """Implements `moe.experts.GroupedExperts`.

    Args:
        experts: a set that `why_not` has nothing against.
    """

    def __init__(self, experts: ExpertSet) -> None:
        from replicas.kernels.gpu import expert_kernels

        self._programs = expert_kernels
        first = experts.tensors[0]
        self._experts = experts  # keeps the memory that the addresses lead to
        self._dtype, device = first[UP].dtype, first[UP].device
        self._dim, self._ffn = first[DOWN].shape
        self._biased = UP_BIAS in first, DOWN_BIAS in first and experts.down_bias
        self._addresses = torch.tensor(
            [
                [
                    tensors[name].data_ptr() if name in tensors else 0
                    for name in (UP, UP_BIAS, DOWN, DOWN_BIAS)
                ]
                for tensors in (experts.tensors[slot] for slot in experts.order)
            ],
            device=device,
        )
        places = [experts.order.index(slot) for slot in range(len(experts.tensors))]
        # One more, reached by -1, for what is elsewhere.
        self._place = torch.tensor([*places, len(places)], device=device)

    @staticmethod
    def why_not(experts: ExpertSet) -> list[str]:
        """All reasons why the experts cannot go together; empty when they can."""
        first, reasons = experts.tensors[0], []
        kinds = {
            tuple(
                (name, tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous())
                for name, tensor in sorted(tensors.items())
            )
            for tensors in experts.tensors
        }
        if set(first) - {UP_BIAS, DOWN_BIAS} != {UP, DOWN}:
            reasons.append("their weights are stored in another way")
        elif len(kinds) > 1 or len({(t.dtype, t.is_contiguous()) for t in first.values()}) > 1:
            reasons.append("they differ in what they have, or in dtype or layout")
        elif first[UP].shape != (2 * first[DOWN].shape[1], first[DOWN].shape[0]):
            reasons.append("gate and up are not one weight")
        return reasons

    def forward(
        self, hidden_AD: torch.Tensor, slot_AK: torch.Tensor, weight_AK: torch.Tensor
    ) -> torch.Tensor:
        """See `GroupedExperts.forward`.

        Raises:
            InternalError: the rows are not of these experts' width and dtype.
        """
        num_rows, top_k = slot_AK.shape
        if hidden_AD.shape != (num_rows, self._dim) or hidden_AD.dtype != self._dtype:
            raise InternalError(
                f"Experts of width {self._dim} in {self._dtype} got rows {tuple(hidden_AD.shape)} "
                f"in {hidden_AD.dtype} for slots {tuple(slot_AK.shape)}."
            )
        output_AD = hidden_AD.new_empty((num_rows, self._dim), dtype=torch.float64)
        if not num_rows:
            return output_AD
        num_local = len(self._experts.tensors)
        here_AK = (slot_AK >= 0) & (slot_AK < num_local)
        place_AK = self._place[torch.where(here_AK, slot_AK, -1)]
        pairs = SortedPairs.build(place_AK, weight_AK.float(), num_local)
        products_MD = self._products(hidden_AD.contiguous(), pairs)
        grid = (num_rows, -(-self._dim // _STRETCH))
        self._programs.expert_sum_kernel[grid](
            products_MD,
            pairs.pair_AK,
            pairs.weight_M,
            heaviest(weight_AK.float()),
            pairs.num_here,
            output_AD,
            self._dim,
            TOP_K=top_k,
            WIDTH=_STRETCH,
            BITS=BITS,
            MAX_SHIFT=MAX_SHIFT,
        )
        return output_AD

    def _products(self, hidden_AD: torch.Tensor, pairs: SortedPairs) -> torch.Tensor:
        """Each pair's weighted output, (M, D) fp32; rows of pairs elsewhere hold anything."""
        num_pairs, num_blocks = pairs.row_M.numel(), pairs.block_expert_B.numel()
        inner_MF = hidden_AD.new_empty((num_pairs, self._ffn))
        products_MD = hidden_AD.new_empty((num_pairs, self._dim), dtype=torch.float32)
        blocks = pairs.block_expert_B, pairs.block_first_B, pairs.block_end_B
        sizes = {"BM": _ROWS, "BN": _COLUMNS, "BK": _DEPTH}
        self._programs.expert_gate_kernel[(num_blocks, -(-self._ffn // _COLUMNS))](
            hidden_AD,
            pairs.row_M,
            *blocks,
            self._addresses,
            inner_MF,
            self._dim,
            self._ffn,
            self._experts.glu_limit,
            self._experts.glu_alpha,
            BIASED=self._biased[0],
            CLAMPED=self._experts.glu_limit > 0,
            **sizes,
        )
        self._programs.expert_down_kernel[(num_blocks, -(-self._dim // _COLUMNS))](
            inner_MF,
            pairs.weight_M,
            *blocks,
            self._addresses,
            products_MD,
            self._dim,
            self._ffn,
            BIASED=self._biased[1],
            **sizes,
        )
        return products_MD
