"""FlashInfer's paged prefill wrapper, by its definition: the signatures of release 0.6.18.

Refuses what the true one refuses or takes for something else, indices of another type among them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch


class BatchPrefillWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: torch.Tensor | None = None,
        paged_kv_indptr_buf: torch.Tensor | None = None,
        paged_kv_indices_buf: torch.Tensor | None = None,
        paged_kv_last_page_len_buf: torch.Tensor | None = None,
        custom_mask_buf: torch.Tensor | None = None,
        mask_indptr_buf: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
        jit_kwargs: dict[str, Any] | None = None,
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "NHD"
        assert backend == "fa2"
        self.num_plans = 0
        self._plan: dict[str, Any] = {}
        MADE.append(self)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None,
        o_data_type: str | torch.dtype | None = None,
        non_blocking: bool = True,
        prefix_len_ptr: torch.Tensor | None = None,
        token_pos_in_items_ptr: torch.Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: torch.Tensor | None = None,
        seq_lens: torch.Tensor | None = None,
        seq_lens_q: torch.Tensor | None = None,
        block_tables: torch.Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        for indices in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert indices.dtype == torch.int32
        assert causal
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert len(paged_kv_indices) == int(paged_kv_indptr[-1])
        self.num_plans += 1
        self._plan = {name: value for name, value in locals().items() if name != "self"}

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        kv_cache_sf: torch.Tensor | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> torch.Tensor:
        plan = self._plan
        assert q.is_contiguous()
        assert q.shape[0] == int(plan["qo_indptr"][-1])
        assert q.dtype == plan["q_data_type"]
        output = torch.empty_like(q)
        for request in range(len(plan["paged_kv_last_page_len"])):
            output_rows = slice(*plan["qo_indptr"][request : request + 2].tolist())
            output[output_rows] = self._attend(q[output_rows], paged_kv_cache, request)
        return output

    def _attend(
        self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor], request: int
    ) -> torch.Tensor:
        plan = self._plan
        begin, end = plan["paged_kv_indptr"][request : request + 2].tolist()
        length = (end - begin - 1) * plan["page_size"] + int(
            plan["paged_kv_last_page_len"][request]
        )
        pages = plan["paged_kv_indices"][begin:end].long()
        keys, values = (plane[pages].flatten(0, 1)[:length].float() for plane in paged_kv_cache)
        group = plan["num_qo_heads"] // plan["num_kv_heads"]
        keys, values = (part.repeat_interleave(group, dim=1) for part in (keys, values))
        scores = torch.einsum("qhp,shp->hqs", q.float(), keys) * plan["sm_scale"]
        column = torch.arange(length)
        row = column[length - q.shape[0] :, None]
        visible = column <= row
        if plan["window_left"] >= 0:
            visible &= column >= row - plan["window_left"]
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        return torch.einsum("hqs,shp->qhp", weights, values).to(q.dtype)


MADE: list[BatchPrefillWithPagedKVCacheWrapper] = []


def fake_module() -> ModuleType:
    """To stand in `sys.modules`."""
    MADE.clear()
    module = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    return module
