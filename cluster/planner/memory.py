"""Bytes of one rank, part by part, before anything runs. Arithmetic only; torch-free.

Weights and KV bytes come from the model code's own declarations (`replicas/models/memory.py`);
here they are joined by what a step needs besides (workspace), what a process costs, and how a
node's memory is shared. All figures are predictions; a worker reports what it measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.base.amount_text import size_text
from cluster.dist.topology import Node
from replicas.models.arch import ArchConfig, LayerSpec
from replicas.models.memory import DTYPE_BYTES, PINNED_SPARE

CPU_USABLE = 0.9
"""Share of a node's memory that is planned with; the rest is the operating system's."""
GPU_USABLE = 0.92
"""Share of a device's memory that is planned with; the rest is fragmentation."""
NODE_OVERHEAD_BYTES = 1 << 30
"""Ray's own processes on a node (raylet, GCS, dashboard)."""
FRONT_PROCESS_BYTES = 256 << 20
"""One gateway or leader: Python, Ray, gRPC, a tokenizer; no torch."""
RANK_PROCESS_BYTES = 384 << 20
"""One CPU rank before its first tensor: Python, Ray, torch (255 MiB resident), threads."""
CUDA_CONTEXT_BYTES = 768 << 20
"""CUDA context, kernels, cuBLAS and NCCL buffers of one GPU rank."""
SCORED_ROWS = 256
"""Prompt positions whose logits exist at one time."""
LOGIT_WORDS = 6
"""fp32 words per logit while a step samples or scores."""
CPU_KV_SHARE = 0.8
"""Share of a CPU node's left-over memory that automatic KV caches take together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """What one rank holds during a step besides weights and cache."""

    activations_bytes: int
    logits_bytes: int
    context_bytes: int
    process_bytes: int
    spare_bytes: int = 0
    """Kept free for experts of ranks that are lost."""
    host_bytes: int = 0
    """Beside a device, in the host's memory: what rows pass through on their way to experts."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        step_bytes = self.activations_bytes + self.logits_bytes + self.context_bytes
        return step_bytes + self.process_bytes + self.spare_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """The largest step a rank must survive."""

    max_step_tokens: int
    max_running_requests: int
    max_context: int
    tp_size: int
    dtype: str
    device: str
    ep_size: int = 1
    """Ranks that share the experts whole; all of their rows may come to one."""
    max_moves: int = 0
    """Experts that may be on their way to a rank."""
    micro_batch_tokens: int = 0
    """Most tokens that a layer computes at a time; 0: all of a step's."""

    @property
    def layer_tokens(self) -> int:
        """Tokens that a layer computes at a time."""
        return min(self.max_step_tokens, self.micro_batch_tokens or self.max_step_tokens)


def workspace(arch: ArchConfig, step: StepShape) -> Workspace:
    """Upper estimate of a rank's transient memory.

    activations: T x (6 D + (2 H + 2 G) P / tp + 3 F / tp) values: residual, normed input, the
        layer's output and its reduction; q, k, v and attention output; gate, up and product. In a
        mixture layer F is the shared experts' width and one expert at a time may see every token:
        its rows, their output and the fp32 sum of all outputs come on top. In micro-batches of M
        tokens it is M of these, and what goes in and comes out of the layers, 2 D, of all T.
    logits: Q x V, at most Q = max(running requests, 256) rows at once (prompt scores go in parts
        of 256): six fp32 words each, for gathered logits, their shares, a softmax copy and the
        sorted values and indices of the filters.
    context: one request's keys and values of one layer, gathered from their blocks, and the
        T x S mask of its chunk, as bool and as the fp32 the kernel makes of it.
    """
    values, heads = DTYPE_BYTES[step.dtype], -(-arch.num_heads // step.tp_size)
    kv_heads = arch.kv_heads_per_rank(step.tp_size)
    per_token = 6 * arch.model_dim + (2 * heads + 2 * kv_heads) * arch.head_dim
    per_token += max(_feed_forward_values(arch, layer, step.tp_size) for layer in arch.layers)
    is_cut = step.layer_tokens < step.max_step_tokens
    waiting = 2 * arch.model_dim * step.max_step_tokens if is_cut else 0
    rows = min(step.max_step_tokens, max(step.max_running_requests, SCORED_ROWS))
    gathered = 2 * kv_heads * arch.head_dim * values
    mask = (1 + 4) * min(step.layer_tokens, step.max_context)
    on_gpu = step.device == "cuda"
    moved, staged = _exchange_bytes(arch, step) if step.ep_size > 1 else (0, 0)
    moved += _fetched_bytes(arch, step) if step.max_moves else 0
    return Workspace(
        activations_bytes=(step.layer_tokens * per_token + waiting) * values + moved,
        logits_bytes=rows * arch.vocab_size * LOGIT_WORDS * 4,
        context_bytes=step.max_context * (gathered + mask),
        process_bytes=CUDA_CONTEXT_BYTES if on_gpu else RANK_PROCESS_BYTES,
        host_bytes=staged,
    )


def _feed_forward_values(arch: ArchConfig, layer: LayerSpec, tp_size: int) -> int:
    """Values per token that a layer's feed-forward part holds at one time."""
    if layer.moe is None:
        return 3 * layer.ffn_dim // tp_size
    inner = 3 * (layer.moe.ffn_dim + layer.moe.shared_ffn_dim) // tp_size
    fp32_words = 2 * (2 * arch.model_dim + layer.moe.gate.num_experts)
    return inner + arch.model_dim + fp32_words


def _exchange_bytes(arch: ArchConfig, step: StepShape) -> tuple[int, int]:
    """What an expert-parallel rank holds of others' rows where it computes, and in the host beside
    a device: dropless, so of all ranks at worst, A = ranks x ceil(T / tp) rows.

    host: A x (D as sent and D as received, D fp32 sums of its own and as sent).
    On the CPU: that, and the inner values of one expert, A x 3 F.
    On a device: A x (D as received, D fp64 sums) and for each of a row's K experts D fp32 products,
        F inner values and six numbers of the sorted pairs; D fp32 sums of its own rows. The host
        has besides what copies pass through (`replicas/worker/host_stage.py`).
    """
    moes = [layer.moe for layer in arch.layers if layer.moe]
    ffn_dim, top_k = max(moe.ffn_dim for moe in moes), max(moe.gate.top_k for moe in moes)
    own = -(-step.max_step_tokens // step.tp_size)
    rows, dim, values = step.ep_size * own, arch.model_dim, DTYPE_BYTES[step.dtype]
    host = rows * dim * (2 * values + 2 * 4)
    if step.device != "cuda":
        return host + rows * 3 * ffn_dim * values, 0
    routed = dim * values + top_k * (8 + 4)  # with ids and weights
    down = max(own * routed, rows * dim * 8)
    up = max(rows * routed, own * dim * 4)
    pairs = rows * top_k * (dim * 4 + ffn_dim * values + 6 * 8)
    device = rows * (routed + dim * 8) + pairs + own * dim * 4
    return device, host + math.ceil(PINNED_SPARE * (down + up))


def _fetched_bytes(arch: ArchConfig, step: StepShape) -> int:
    """Experts of the widest layer that a rank holds beside its own while they move; the one that is
    being read is there twice."""
    widest = max(
        expert_bytes(arch, index, step.dtype)
        for index, layer in enumerate(arch.layers)
        if layer.moe
    )
    return (step.max_moves + 1) * widest


def expert_bytes(arch: ArchConfig, layer: int, dtype: str) -> int:
    """One routed expert of a mixture layer, biases included whether there are any or not."""
    moe = arch.layers[layer].moe
    if moe is None:
        return 0
    values = 3 * moe.ffn_dim * arch.model_dim + 2 * moe.ffn_dim + arch.model_dim
    return values * DTYPE_BYTES[dtype]


def cpu_budget_bytes(node: Node, num_front_processes: int) -> int:
    """Bytes of a node's memory that its CPU ranks may share."""
    usable = int(node.memory_bytes * CPU_USABLE)
    return usable - NODE_OVERHEAD_BYTES - num_front_processes * FRONT_PROCESS_BYTES


def gpu_budget_bytes(node: Node) -> int:
    """Bytes that one rank may use of the node's smallest device."""
    return int(min(device.memory_bytes for device in node.devices) * GPU_USABLE)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens of one request."""
    return -(-num_tokens // block_size)


def sum_text(parts: dict[str, int]) -> str:
    """`weights 1GiB + workspace 2MiB = 1GiB`, for reasons and errors."""
    total = sum(parts.values())
    return " + ".join(f"{name} {size_text(size)}" for name, size in parts.items()) + (
        f" = {size_text(total)}"
    )
