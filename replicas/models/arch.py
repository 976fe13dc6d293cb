"""What an architecture is, as data: torch-free, so planner and gateway read it too.

`ArchConfig` is the only thing model code, planner and offload layout know about a checkpoint;
`replicas/models/hf_config.py` builds it from a Hugging Face `config.json`. Layers may differ from
each other (`layers[i]`), everything else is one value for the model.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from moe.spec import MoeSpec


class PositionKind(enum.StrEnum):
    """How positions enter the model."""

    ROPE = "rope"
    LEARNED = "learned"


class NormKind(enum.StrEnum):
    """Normalisation used before attention, MLP and head."""

    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of one kind of layer; `kind` as in the config's `rope_type`.

    Sources: linear (Chen et al. 2023), dynamic NTK and YaRN (Peng et al. 2023, arXiv 2309.00071),
    llama3 (Llama 3.1 reference code), as `transformers.modeling_rope_utils` computes them.
    """

    kind: str = "default"
    theta: float = 10000.0
    rotary_dim: int = 0
    factor: float = 1.0
    original_max_position: int = 0
    """Context length before scaling, for the kinds that need it (dynamic, llama3, yarn)."""
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    All heads share one cached row per token: a latent of `rank` values and a rotated key of
    `rope_dim`. Such a model has one key/value head of `rank + rope_dim`.
    """

    rank: int
    """Width of the key/value latent (`kv_lora_rank`)."""
    query_rank: int
    """Width of the query latent (`q_lora_rank`); 0: queries are projected directly."""
    nope_dim: int
    """Part of a query head that is not rotated."""
    rope_dim: int
    value_dim: int
    scale: float
    """Factor on the attention scores."""
    interleaved: bool = True
    """Rotated pairs are neighbours, (x[2i], x[2i + 1])."""
    bias: bool = False
    """Biases on the projections into latents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What may differ between layers."""

    ffn_dim: int = 0
    """Inner width of a dense MLP; 0 in a mixture layer."""
    moe: MoeSpec | None = None
    """A mixture of experts instead of the dense MLP."""
    sliding_window: int | None = None
    attention_scale: float | None = None
    """Factor on the attention scores; None is the usual head_dim ** -0.5."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchConfig:
    """One decoder-only model. Sizes are global (before tensor parallelism)."""

    family: str
    """The row of `replicas/models/registry.py` that computes it."""
    vocab_size: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    """Positions the model is meant for, its RoPE scaling included; a hard limit when learned."""
    norm: NormKind
    norm_eps: float
    activation: str
    """silu, gelu, gelu_new (tanh), gelu_pytorch_tanh or relu, as the config calls it."""
    gated_mlp: bool
    position: PositionKind
    rope: RopeSpec | None
    position_offset: int = 0
    """Rows to skip in the learned position table (OPT: 2)."""
    embed_dim: int = 0
    """Token embedding width when it differs from `model_dim` (OPT's projections)."""
    attention_bias: bool = False
    """Bias on the q, k, v projections."""
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_sinks: bool = False
    """Each query head has a learned score that takes part in the softmax and adds nothing."""
    latent: LatentSpec | None = None
    """Latent attention instead of keys and values per head."""
    num_prediction_layers: int = 0
    """Layers after the last one that a checkpoint may hold and that are not used."""
    norm_before: bool = True
    """False: layer norm after the residual sum (OPT-350m)."""
    final_norm: bool = True
    norm_affine: bool = True
    tie_embeddings: bool = False
    dtype: str = "float32"
    """The checkpoint's own dtype: float32, bfloat16 or float16."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def kv_planes(self) -> int:
        """Planes of the KV cache: keys and values, or the latents that are both."""
        return 2 if self.latent is None else 1

    def kv_heads_per_rank(self, tp_size: int) -> int:
        """KV heads that each tensor-parallel rank holds; fewer heads than ranks are replicated."""
        return max(1, self.num_kv_heads // tp_size)

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(layer.moe for layer in self.layers)

    def why_not_tp(self, tp_size: int, *, whole_experts: bool = False) -> list[str]:
        """All reasons why this model cannot be split over `tp_size` ranks; empty if it can.

        Args:
            whole_experts: routed experts are spread over ranks as they are, not sliced.
        """
        reasons = []
        if self.num_heads % tp_size:
            reasons.append(f"{self.num_heads} attention heads are not divisible by tp={tp_size}")
        if self.num_kv_heads % tp_size and tp_size % self.num_kv_heads:
            reasons.append(
                f"{self.num_kv_heads} key/value heads neither divide nor are divided by "
                f"tp={tp_size}"
            )
        reasons.extend(
            f"feed-forward width {ffn_dim} is not divisible by tp={tp_size}"
            for ffn_dim in sorted({layer.ffn_dim for layer in self.layers})
            if ffn_dim % tp_size
        )
        for moe in dict.fromkeys(layer.moe for layer in self.layers if layer.moe):
            if moe.ffn_dim % tp_size and not whole_experts:
                reasons.append(f"expert width {moe.ffn_dim} is not divisible by tp={tp_size}")
            if moe.shared_ffn_dim % tp_size:
                reasons.append(
                    f"shared expert width {moe.shared_ffn_dim} is not divisible by tp={tp_size}"
                )
        return reasons
