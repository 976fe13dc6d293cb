"""From the packed tokens of a step to the padded batches that transformers computes. Pure.

A batch is rectangular: R requests of S query columns over L context columns, everything aligned to
the right, so that a column's distance to the query is its distance in the text. Columns on the left
are masked, and their queries compute garbage that nobody reads.

    request 0 (9 tokens, 3 of them new)   k k k k k k q q q
    request 1 (4 tokens, 1 of them new)   . . . . . k k k q      S = 3, L = 9
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from replicas.attention.backend import AttentionMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddingBounds:
    """How large a batch may become."""

    max_query_columns: int
    """Of R x S; at least the tokens of the longest chunk."""
    max_context_columns: int
    """Of R x L; at least the longest context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedBatch:
    """One forward pass; Q real queries among the R x S columns."""

    token_ids_RS: torch.Tensor
    positions_RS: torch.Tensor
    mask_RL: torch.Tensor
    """int64, 1 where a column holds a token."""
    packed_Q: torch.Tensor
    """Index of each query among the packed tokens of the step."""
    row_Q: torch.Tensor
    column_Q: torch.Tensor
    write_slots_Q: torch.Tensor
    """Where the keys and values of each query go in the cache."""
    read_slots_RL: torch.Tensor
    """Where those of each column are; 0 in masked ones."""


def group_requests(
    query_lens: Sequence[int], seq_lens: Sequence[int], bounds: PaddingBounds
) -> list[list[int]]:
    """Requests that share a pass, as few passes as the bounds allow with similar ones together.

    Every pass moves all weights, so padding is cheaper than another pass.
    """
    groups: list[list[int]] = []
    longest_query = longest_context = 0
    order = sorted(range(len(query_lens)), key=lambda i: (-query_lens[i], -seq_lens[i], i))
    for index in order:
        size = len(groups[-1]) + 1 if groups else 1
        context = max(longest_context, seq_lens[index])
        fits = (
            size * longest_query <= bounds.max_query_columns
            and size * context <= bounds.max_context_columns
        )
        if groups and fits:
            groups[-1].append(index)
            longest_context = context
        else:
            groups.append([index])
            longest_query, longest_context = query_lens[index], seq_lens[index]
    return groups


def pad_requests(
    members: Sequence[int],
    token_ids_T: torch.Tensor,
    positions_T: torch.Tensor,
    metadata: AttentionMetadata,
    block_size: int,
) -> PaddedBatch:
    """The batch of some requests (indices into the step)."""
    starts, seq_lens = metadata.query_start, [metadata.seq_lens[i] for i in members]
    lens = [starts[i + 1] - starts[i] for i in members]
    num_rows, width, length = len(members), max(lens), max(seq_lens)
    device = token_ids_T.device
    packed = [torch.arange(starts[i], starts[i + 1], device=device) for i in members]
    columns = [torch.arange(width - n, width, device=device) for n in lens]
    packed_Q, column_Q = torch.cat(packed), torch.cat(columns)
    row_Q = torch.repeat_interleave(
        torch.arange(num_rows, device=device), torch.tensor(lens, device=device)
    )
    token_ids_RS = torch.zeros((num_rows, width), dtype=torch.int64, device=device)
    positions_RS = torch.zeros_like(token_ids_RS)
    token_ids_RS[row_Q, column_Q] = token_ids_T[packed_Q]
    positions_RS[row_Q, column_Q] = positions_T[packed_Q]
    context_RL = torch.arange(length, device=device)[None, :] - torch.tensor(
        [[length - n] for n in seq_lens], device=device
    )
    mask_RL = context_RL >= 0
    known_RL = context_RL.clamp_min(0)
    blocks_RL = metadata.block_tables_RN[list(members)].long().gather(1, known_RL // block_size)
    slots_RL = blocks_RL * block_size + known_RL % block_size
    return PaddedBatch(
        token_ids_RS=token_ids_RS,
        positions_RS=positions_RS,
        mask_RL=mask_RL.long(),
        packed_Q=packed_Q,
        row_Q=row_Q,
        column_Q=column_Q,
        write_slots_Q=metadata.slot_mapping_T[packed_Q],
        read_slots_RL=torch.where(mask_RL, slots_RL, 0),
    )
