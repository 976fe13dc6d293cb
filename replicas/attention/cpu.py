"""The CPU backend: torch's fused attention, one call per request.

A call sees one request only, so its rows cannot depend on who else is in the batch; measured, a
call costs 17 us and batching the decode rows of 16 requests gains nothing (torch's CPU kernel
walks (request, head) pairs one after another). Decode rows lay the query heads of a kv head side
by side as rows of one query: up to six times faster in bf16 than the kernel's own head sharing.
With a sliding window only the blocks it can see are read.

A head's sink becomes one more key, without a value: queries carry the sink's score in an extra
column, in which that key alone is not zero.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from replicas.attention.backend import AttentionBlock, AttentionMetadata, AttentionSpec
from replicas.attention.paging import gather_context, write_slots
from replicas.kernels.ops import HeadShape

_SINK_COLUMNS = 8  # one is used; rows stay a multiple of a vector


class CpuAttention:
    """Paged attention on `scaled_dot_product_attention`; fp32 softmax and accumulation."""

    name = "cpu"

    def __init__(self, spec: AttentionSpec) -> None:
        self._spec = spec
        self._group = spec.num_heads // spec.num_kv_heads

    @staticmethod
    def why_not(spec: AttentionSpec) -> list[str]:
        """All reasons why this backend cannot run `spec`; empty when it can."""
        reasons = []
        if spec.device.split(":")[0] != "cpu":
            reasons.append(f"it runs on cpu tensors, not on {spec.device}")
        if spec.num_heads % spec.num_kv_heads:
            reasons.append(
                f"{spec.num_heads} heads do not share {spec.num_kv_heads} kv heads evenly"
            )
        return reasons

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
            first = metadata.seq_lens[request] - (end - begin)
            seen = 0 if sliding_window is None else max(0, first - sliding_window + 1)
            keys_SGP, values_SGP, start = gather_context(kv_2NBGP, metadata, request, seen)
            rows = query_THP[begin:end]
            if end - begin == 1:
                skip = seen - start
                output_THP[begin:end] = self._decode(
                    rows, keys_SGP[skip:], values_SGP[skip:], sinks_H
                )
            else:
                visible_QS = _visible(end - begin, len(keys_SGP), first - start, sliding_window)
                output_THP[begin:end] = self._chunk(rows, keys_SGP, values_SGP, visible_QS, sinks_H)
        return output_THP

    def _decode(
        self,
        query_1HP: torch.Tensor,
        keys_SGP: torch.Tensor,
        values_SGP: torch.Tensor,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """One token that sees every given row."""
        if sinks_H is not None:
            query_1HP, keys_SGP, values_SGP = self._with_sink(
                query_1HP, keys_SGP, values_SGP, sinks_H
            )
        heads, group, width = self._spec.num_kv_heads, self._group, query_1HP.shape[-1]
        output = functional.scaled_dot_product_attention(
            query_1HP.view(1, heads, group, width),
            keys_SGP.transpose(0, 1).unsqueeze(0),
            values_SGP.transpose(0, 1).unsqueeze(0),
            scale=self._spec.scale,
        )
        return output.reshape(1, heads * group, width)[..., : self._spec.head_dim]

    def _chunk(
        self,
        query_QHP: torch.Tensor,
        keys_SGP: torch.Tensor,
        values_SGP: torch.Tensor,
        visible_QS: torch.Tensor | None,
        sinks_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Several tokens of one request; None: the keys are theirs alone, plainly causal."""
        if sinks_H is not None:
            if visible_QS is None:
                visible_QS = _triangle(query_QHP.shape[0], keys_SGP.shape[0], offset=0)
            visible_QS = functional.pad(visible_QS, (1, 0), value=True)
            query_QHP, keys_SGP, values_SGP = self._with_sink(
                query_QHP, keys_SGP, values_SGP, sinks_H
            )
        output = functional.scaled_dot_product_attention(
            query_QHP.transpose(0, 1).unsqueeze(0),
            keys_SGP.transpose(0, 1).unsqueeze(0),
            values_SGP.transpose(0, 1).unsqueeze(0),
            attn_mask=visible_QS,
            is_causal=visible_QS is None,
            scale=self._spec.scale,
            enable_gqa=self._group > 1,
        )
        return output.squeeze(0).transpose(0, 1)[..., : self._spec.head_dim]

    def _with_sink(
        self,
        query_QHP: torch.Tensor,
        keys_SGP: torch.Tensor,
        values_SGP: torch.Tensor,
        sinks_H: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Wider rows, and the sink as the first key: its score is scale * (sink / scale) * 1."""
        pad = (0, _SINK_COLUMNS)
        width = query_QHP.shape[-1]
        query = functional.pad(query_QHP, pad)
        query[..., width] = sinks_H / self._spec.scale
        keys = functional.pad(keys_SGP, (*pad, 0, 0, 1, 0))
        keys[0, :, width] = 1
        return query, keys, functional.pad(values_SGP, (*pad, 0, 0, 1, 0))


def _visible(
    num_queries: int, num_keys: int, offset: int, window: int | None
) -> torch.Tensor | None:
    """Which keys each query sees, (Q, S) bool; None: the first query stands at the first key and
    each sees all keys up to its own."""
    if offset == 0 and (window is None or window >= num_keys):
        return None
    visible_QS = _triangle(num_queries, num_keys, offset)
    return visible_QS if window is None else visible_QS.triu_(offset - window + 1)


def _triangle(num_queries: int, num_keys: int, offset: int) -> torch.Tensor:
    return torch.ones(num_queries, num_keys, dtype=torch.bool).tril_(offset)
