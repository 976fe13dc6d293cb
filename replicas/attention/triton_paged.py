"""The GPU backend that needs nothing but Triton: paged attention without gathered copies.

A row's result depends on its own request alone (see `replicas/kernels/gpu/paged_attention.py`).
On the CPU it runs only under Triton's interpreter, which is what its tests use.
"""

from __future__ import annotations

import importlib.util

import torch

from cluster.base.env import triton_interpreter
from replicas.attention.backend import AttentionBlock, AttentionMetadata, AttentionSpec
from replicas.kernels.ops import HeadShape

_DTYPES = ("float32", "float16", "bfloat16")


class TritonPagedAttention:
    """Paged attention of one rank in Triton."""

    name = "triton_paged"

    def __init__(self, spec: AttentionSpec) -> None:
        # The kernels import Triton, which many machines do not have: only who asks for it pays.
        from replicas.kernels.gpu import paged_attention

        self._spec = spec
        self._kernels = paged_attention

    @staticmethod
    def why_not(spec: AttentionSpec) -> list[str]:
        """All reasons why this backend cannot run `spec`; empty when it can."""
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed")
        if spec.device.split(":")[0] == "cpu" and not triton_interpreter():
            reasons.append(f"it runs on cuda tensors, not on {spec.device}")
        if spec.dtype not in _DTYPES:
            reasons.append(f"it knows {', '.join(_DTYPES)}, not {spec.dtype}")
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
        self.write(key_TGP, value_TGP, kv_2NBGP, metadata)
        output_THP = torch.empty_like(query_THP)
        self.attend(
            query_THP, kv_2NBGP, metadata, sliding_window, output_THP, sinks_H, prompts=True
        )
        return output_THP

    def write(
        self,
        key_TGP: torch.Tensor,
        value_TGP: torch.Tensor,
        kv_2NBGP: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> None:
        """Keys and values to their slots, in place."""
        self._kernels.write_slots(
            packed_heads(key_TGP),
            packed_heads(value_TGP),
            kv_2NBGP,
            metadata.slot_mapping_T,
            shared_plane=self._spec.shared_plane,
        )

    def attend(  # noqa: PLR0913 - see `forward`
        self,
        query_THP: torch.Tensor,
        kv_2NBGP: torch.Tensor,
        metadata: AttentionMetadata,
        sliding_window: int | None,
        output_THP: torch.Tensor,
        sinks_H: torch.Tensor | None = None,
        *,
        prompts: bool = False,
    ) -> None:
        """Fill the rows of requests with one row, and with `prompts` those with several."""
        kernels, spec = self._kernels, self._spec
        bounds = zip(metadata.query_start, metadata.query_start[1:], strict=False)
        lengths = [end - begin for begin, end in bounds]
        batch = kernels.PagedBatch(
            query_start_R1=metadata.query_start_R1,
            seq_lens_R=metadata.seq_lens_R,
            block_tables_RN=metadata.block_tables_RN,
            max_query_len=max(lengths) if prompts else 1,
            max_seq_len=max(metadata.seq_lens),
            has_decodes=1 in lengths,
        )
        shape = kernels.PagedShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=spec.block_size,
            scale=spec.scale,
            window=sliding_window or 0,
            shared_plane=spec.shared_plane,
        )
        kernels.paged_attention(
            packed_heads(query_THP), kv_2NBGP, batch, shape, output_THP, sinks_H
        )


def packed_heads(heads_THP: torch.Tensor) -> torch.Tensor:
    """The heads of a row side by side in memory, as the kernels read them; rows may lie apart."""
    if heads_THP.stride(2) == 1 and heads_THP.stride(1) == heads_THP.shape[2]:
        return heads_THP
    return heads_THP.contiguous()
