"""Reading and writing the paged KV tensors: the part every torch backend shares.

A slot is `block id * block_size + offset`; keys and values of one layer lie in (2, N, B, G, P).
"""

from __future__ import annotations

import torch

from replicas.attention.backend import AttentionMetadata


def write_slots(
    key_TGP: torch.Tensor,
    value_TGP: torch.Tensor,
    kv_2NBGP: torch.Tensor,
    metadata: AttentionMetadata,
) -> None:
    """Store this step's keys and values at their slots, in place."""
    # view, not flatten: a layout that would need a copy must fail, not lose the write
    keys_SGP, values_SGP = kv_2NBGP.view(2, -1, *kv_2NBGP.shape[3:]).unbind(0)
    keys_SGP.index_copy_(0, metadata.slot_mapping_T, key_TGP)
    values_SGP.index_copy_(0, metadata.slot_mapping_T, value_TGP)


def gather_context(
    kv_2NBGP: torch.Tensor, metadata: AttentionMetadata, request: int, first: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys and values of one request from position `first` (rounded down to its block) on.

    Returns:
        keys and values, (S, G, P) each, and the position of their first row.
    """
    block_size = kv_2NBGP.shape[2]
    stop = metadata.seq_lens[request]
    first_block = first // block_size
    last_block = -(-stop // block_size)
    blocks_N = metadata.block_tables_RN[request, first_block:last_block]
    start = first_block * block_size
    keys_SGP = kv_2NBGP[0].index_select(0, blocks_N).flatten(0, 1)[: stop - start]
    values_SGP = kv_2NBGP[1].index_select(0, blocks_N).flatten(0, 1)[: stop - start]
    return keys_SGP, values_SGP, start
