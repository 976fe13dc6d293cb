"""How a row travels: hidden state, gate weights and experts as one run of bytes.

    | hidden: D elements, padded to 4 | scale fp32 (quantised) | K weights fp32 | K experts int32 |

One buffer, so that payload and routing are one message; how sums come home is in answers.py.
Everything but the default is lossy and has to be chosen.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.base.errors import ConfigError
from moe.plan import NOWHERE

_INT8_MAX = 127.0
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
_ALIGNMENT = 4


class Dispatch(enum.StrEnum):
    """How hidden states travel to the experts."""

    EXACT = "exact"
    INT8 = "int8"
    """One scale a row, round to nearest."""
    FP8 = "fp8"
    """e4m3 with one scale a row."""


class Combine(enum.StrEnum):
    """How partial sums travel back between ranks (between nodes where there are two hops)."""

    FP32 = "fp32"
    """Nothing is rounded on the way; four bytes an element."""
    BF16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class WireFormat:
    """The layout of rows; the same at all ranks.

    Raises:
        ConfigError: a dimension below one.
    """

    dim: int
    dtype: torch.dtype
    """Of the hidden states, here and at the experts."""
    top_k: int
    """Most experts of a row; rows with fewer are filled up."""
    dispatch: Dispatch = Dispatch.EXACT
    combine: Combine = Combine.FP32

    def __post_init__(self) -> None:
        if self.dim < 1 or self.top_k < 1:
            raise ConfigError(f"Rows of {self.dim} elements and {self.top_k} experts do not exist.")

    @property
    def hidden_bytes(self) -> int:
        """Bytes before the weights."""
        if self.dispatch is Dispatch.EXACT:
            return _aligned(self.dim * self.dtype.itemsize)
        return _aligned(self.dim) + 4

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on the way out."""
        return self.hidden_bytes + 8 * self.top_k

    def pack(
        self, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """Rows as bytes: uint8 (T, row_bytes)."""
        num_rows, top_k = expert_TK.shape
        rows = torch.empty((num_rows, self.row_bytes), dtype=torch.uint8)
        self._pack_hidden(rows, hidden_TD)
        weights = rows[:, self.hidden_bytes : self.hidden_bytes + 4 * self.top_k]
        experts = rows[:, self.hidden_bytes + 4 * self.top_k :].view(torch.int32)
        weights.view(torch.float32)[:, :top_k] = weight_TK
        experts[:, :top_k] = expert_TK
        if top_k < self.top_k:
            weights.view(torch.float32)[:, top_k:] = 0
            experts[:, top_k:] = NOWHERE
        return rows

    def routing(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """What `experts` and `weights` read, of packed rows in pieces: uint8 (A, 8 K)."""
        return torch.cat([rows[:, self.hidden_bytes :] for rows in pieces])

    def experts(self, routing: torch.Tensor) -> torch.Tensor:
        """Physical experts: int64 (A, K)."""
        return routing[:, 4 * self.top_k :].view(torch.int32).long()

    def weights(self, routing: torch.Tensor) -> torch.Tensor:
        """Gate weights: fp32 (A, K)."""
        return routing[:, : 4 * self.top_k].view(torch.float32)

    def hidden(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hidden states of packed rows in pieces, one contiguous copy in `dtype`."""
        return torch.cat([self._hidden(rows) for rows in pieces])

    def _hidden(self, rows: torch.Tensor) -> torch.Tensor:
        if self.dispatch is Dispatch.EXACT:
            return rows[:, : self.dim * self.dtype.itemsize].view(self.dtype)
        codes = rows[:, : self.dim]
        narrow = codes.view(torch.int8 if self.dispatch is Dispatch.INT8 else _FP8)
        scale = rows[:, self.hidden_bytes - 4 : self.hidden_bytes].view(torch.float32)
        return (narrow.to(torch.float32) * scale).to(self.dtype)

    def _pack_hidden(self, rows: torch.Tensor, hidden_TD: torch.Tensor) -> None:
        if self.dispatch is Dispatch.EXACT:
            rows[:, : self.dim * self.dtype.itemsize].view(self.dtype).copy_(hidden_TD)
            return
        hidden_TD = hidden_TD.to(torch.float32)
        most = _INT8_MAX if self.dispatch is Dispatch.INT8 else _FP8_MAX
        scale_T1 = hidden_TD.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / most
        codes = hidden_TD / scale_T1
        if self.dispatch is Dispatch.INT8:
            rows[:, : self.dim].view(torch.int8).copy_(codes.round())
        else:
            rows[:, : self.dim].view(_FP8).copy_(codes.to(_FP8))
        rows[:, self.hidden_bytes - 4 : self.hidden_bytes].view(torch.float32).copy_(scale_T1)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
