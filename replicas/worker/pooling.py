"""Embeddings: turns the hidden states of a prompt, which may come in chunks, into one vector.

Owns the running sums of mean pooling. A sum must see every prompt token: when a prefix cache hit
hid some of them, the answer is an error, never the mean of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from replicas.api import Pooling


@dataclass(slots=True, kw_only=True)
class _RunningSum:
    total_D: torch.Tensor
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooled:
    """A finished embedding, or why there is none."""

    embedding: tuple[float, ...] = ()
    error: str = ""


class PoolingStates:
    """Running sums by request key."""

    def __init__(self) -> None:
        self._sums: dict[int, _RunningSum] = {}

    def forget(self, key: int) -> None:
        """Drop a request's sum; it finished, or starts again from its first token."""
        self._sums.pop(key, None)

    def add(
        self,
        key: int,
        pooling: Pooling,
        hidden_TD: torch.Tensor,
        *,
        num_computed_tokens: int,
        num_prompt_tokens: int,
    ) -> Pooled | None:
        """Take in a chunk of a prompt.

        Args:
            hidden_TD: hidden states of the chunk's tokens.
            num_computed_tokens: position of the chunk's first token.

        Returns:
            The embedding (not normalised) or an error when the prompt is complete, else None.
        """
        complete = num_computed_tokens + len(hidden_TD) >= num_prompt_tokens
        if pooling is Pooling.LAST:
            return _answer(hidden_TD[-1]) if complete else None
        state = self._sums.setdefault(
            key, _RunningSum(total_D=hidden_TD.new_zeros(hidden_TD.shape[1], dtype=torch.float32))
        )
        state.total_D += hidden_TD.float().sum(dim=0)
        state.num_tokens += len(hidden_TD)
        if not complete:
            return None
        self.forget(key)
        if state.num_tokens != num_prompt_tokens:
            return Pooled(
                error=f"Mean pooling saw {state.num_tokens} of {num_prompt_tokens} prompt tokens; "
                "the others came from the prefix cache, which keeps no hidden states."
            )
        return _answer(state.total_D / state.num_tokens)


def _answer(vector_D: torch.Tensor) -> Pooled:
    if not bool(vector_D.isfinite().all()):
        return Pooled(error="The model produced an embedding that is not finite.")
    return Pooled(embedding=tuple(vector_D.float().tolist()))
