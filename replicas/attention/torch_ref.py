"""The oracle: paged attention written out as the definition says, request by request, in fp32.

Correct and plain rather than fast; the other backends are tested against it. Runs on any device.
"""

from __future__ import annotations

import torch

from replicas.attention.backend import AttentionBlock, AttentionMetadata, AttentionSpec
from replicas.attention.paging import gather_context, write_slots
from replicas.kernels.ops import HeadShape


class TorchReferenceAttention:
    """softmax([scale * Q K^T + mask, sinks]) [V, 0] with scores, softmax and sum in fp32."""

    name = "torch_ref"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec

    @staticmethod
    def why_not(spec: AttentionSpec) -> list[str]:
        """All reasons why this backend cannot run `spec`; empty when it can."""
        if spec.num_heads % spec.num_kv_heads:
            return [f"{spec.num_heads} heads do not share {spec.num_kv_heads} kv heads evenly"]
        return []

    def block(
        self, heads: HeadShape, sliding_window: int | None, *, with_bias: bool
    ) -> AttentionBlock | None:
        """See `AttentionBackend.block`: there is none."""
        return None

    def forward(  # noqa: PLR0913 - sinks are one family's own
        self,
        query_THP: torch.Tensor,
        key_TGP: torch.Tensor,
        value_TGP: torch.Tensor,
        kv_2NBGP: torch.Tensor,
        metadata: AttentionMetadata,
        sliding_window: int | None,
        sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write keys and values to their slots, then attend; see `AttentionBackend.forward`."""
        write_slots(key_TGP, value_TGP, kv_2NBGP, metadata)
        output_THP = torch.empty_like(query_THP)
        bounds = zip(metadata.query_start, metadata.query_start[1:], strict=False)
        for request, (begin, end) in enumerate(bounds):
            output_THP[begin:end] = self._attend(
                query_THP[begin:end], kv_2NBGP, metadata, request, sliding_window, sinks_H
            )
        return output_THP

    def _attend(
        self,
        query_QHP: torch.Tensor,
        kv_2NBGP: torch.Tensor,
        metadata: AttentionMetadata,
        request: int,
        window: int | None,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        keys_SGP, values_SGP, _ = gather_context(kv_2NBGP, metadata, request, first=0)
        group = self._spec.num_heads // self._spec.num_kv_heads
        keys_HSP = keys_SGP.float().repeat_interleave(group, dim=1).transpose(0, 1)
        values_HSP = values_SGP.float().repeat_interleave(group, dim=1).transpose(0, 1)
        scores_HQS = query_QHP.float().transpose(0, 1) @ keys_HSP.transpose(1, 2) * self._spec.scale
        seq_len = metadata.seq_lens[request]
        column_S = torch.arange(seq_len, device=query_QHP.device)
        row_Q1 = column_S[seq_len - query_QHP.shape[0] :, None]
        visible_QS = column_S <= row_Q1
        if window is not None:
            visible_QS &= column_S > row_Q1 - window
        scores_HQS = scores_HQS.masked_fill(~visible_QS, float("-inf"))
        if sinks_H is not None:
            sinks_HQ1 = sinks_H.float()[:, None, None].expand(-1, scores_HQS.shape[1], 1)
            scores_HQS = torch.cat((scores_HQS, sinks_HQ1), dim=-1)
        output_HQP = torch.softmax(scores_HQS, dim=-1)[..., :seq_len] @ values_HSP
        return output_HQP.transpose(0, 1).to(query_QHP.dtype)
