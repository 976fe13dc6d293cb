"""Plan of a model that transformers' own code computes, its weights held by DeepSpeed's ZeRO-3."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayer:
    """Keys and values of one token in one layer; no heads where a layer keeps none."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        """Values per head in the cache, whose planes for keys and values are equally wide."""
        return max(self.key_dim, self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignModel:
    """Sizes of a causal language model that we have no code for.

    `num_values` and the like count parameters, tied ones once.
    """

    architecture: str
    """Name of transformers' class."""
    vocab_size: int
    model_dim: int
    num_heads: int
    max_position: int
    dtype: str
    num_values: int
    largest_values: int
    """Of one parameter tensor."""
    layer_values: int
    """Of the largest repeated layer."""
    tensors_per_module: int
    """Most parameter tensors that one module owns itself, so that it needs them at one time."""
    materialises_scores: bool
    """Whether attention scores of all heads exist as a tensor."""
    kv: tuple[KvLayer, ...]
    eos_token_ids: tuple[int, ...] = ()

    @property
    def kv_values_per_token(self) -> int:
        """Values that the cache holds for each token, over all layers."""
        return sum(2 * layer.num_heads * layer.width for layer in self.kv)


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero3Plan:
    """How a rank holds such a model."""

    model: ForeignModel
    tier: str
    """Where the weights are between their uses: `memory` or `disk`."""
    disk_path: str
    """Directory for the weights of a `disk` tier; each process writes its own copy at start."""
    window_values: int
    """Parameters that may be in memory beyond those of the module that runs."""
    num_buffers: int
    """Of a `disk` tier: buffers of reads, each as large as the largest parameter tensor."""
    max_query_columns: int
    """Bound on rows x new tokens of one padded batch."""
    max_context_columns: int
    """Bound on rows x context of one padded batch."""
