"""Seconds of one pass over a model whose weights are streamed: closed forms, torch-free.

Everything overlaps, so a pass takes as long as its busiest resource:

    t = max( (r S_disk - H) / BW_disk, S_disk / BW_decode, S_link / BW_link, C,
             KV_link / BW_link, A_host, E_host )

S: bytes streamed in a pass after quantisation. r: what compression leaves of them on disk. H: what
of that memory holds. One core decodes all of it, and where none is free it takes from those that
compute. C: the device's own work, one thing after another: multiplications with weights as they are
stored, attention over the KV cache it holds, and what each row takes beside its products (norms,
heads, activations, sampling). A, E: attention and experts that the host computes. Where the host is
the device, a share l of its computation is lost while the disk is read, and C is more by l times
the disk's time; nothing of it shows where reads last.
tokens/s = batch / t; with S / BW the largest term this is ZeRO-Inference's rule: throughput is
batch x link / model.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cluster.base.plan import HostExpertsPlan
from offload.compression import Compression
from offload.expert_division import ExpertWork, compute_s, num_for_host
from offload.homes import KvHome, Placement, distinct_experts
from offload.model_shape import LayerShape, ModelShape
from offload.precision import Precision
from offload.rates import Rates

MAX_BALANCE_TOKENS = 131_072
"""No pass is made larger than this, however slow the link is."""
JITTER_SHARE = {1: 1.0, 2: 0.06}
"""Share of the shorter of transfer and compute that a ring of so many slots fails to hide: all of
it with one slot; with two a late transfer is felt (measured 1 % on a quiet machine, 12-19 % on a
loaded one); three or more absorb it."""

BLOCK_TOKENS = 16
"""Of a block of the KV cache, as they are unless the file says otherwise."""
SLOTS_TO_DECODE = 3
"""With fewer slots a record is decoded and computed with in turn: the others are being read. With
just these the disk has less to do at a time, as with two of records that need no decoding (measured
5 % of a pass)."""


class Resource(enum.StrEnum):
    """What a pass can be bound by."""

    DISK = "disk"
    DECODE = "decoding of compressed records"
    LINK = "host to device link"
    COMPUTE = "device compute"
    KV_LINK = "KV cache over the link"
    HOST_ATTENTION = "host attention"
    HOST_EXPERTS = "experts on the host"


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLoad:
    """What one pass computes: `rows` decoding requests, and the rest of its tokens are prompt."""

    rows: int
    context_tokens: int
    """Mean keys that a decoding request attends to."""
    prompt_tokens: int = 0
    prompt_context_tokens: int = 0
    """Mean keys that a prompt token attends to."""

    @property
    def kv_tokens(self) -> int:
        """Whose keys and values the pass attends to."""
        return self.rows * self.context_tokens + (
            self.prompt_context_tokens if self.prompt_tokens else 0
        )

    @property
    def tokens(self) -> int:
        """Rows of the matrix products."""
        return self.rows + self.prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """Seconds of every resource, and what the whole pass takes."""

    seconds: tuple[tuple[Resource, float], ...]
    total_s: float

    @property
    def bound(self) -> Resource:
        """The resource that decides."""
        return max(self.seconds, key=lambda entry: entry[1])[0]

    @property
    def transfer_s(self) -> float:
        """The busiest of disk, decoding and link."""
        return max(seconds for name, seconds in self.seconds if name in _TRANSFERS)


_TRANSFERS = (Resource.DISK, Resource.DECODE, Resource.LINK)


def pass_time(model: ModelShape, placement: Placement, rates: Rates, load: PassLoad) -> PassCost:
    """Seconds of one pass of `load` over the model."""
    from_disk, from_host = placement.streamed_bytes(model, load.tokens, load.kv_tokens)
    kv_bytes = load.rows * load.context_tokens * model.kv_bytes_per_token
    overlaps = not rates.device_is_host
    left, experts_s = host_experts_share(model, placement, rates, load)
    decode_s = _decode_s(placement, rates, from_disk)
    disk_s = placement.read_bytes(model, from_disk) / rates.disk_bytes_per_s
    seconds = {
        Resource.DISK: disk_s,
        Resource.DECODE: decode_s,
        Resource.LINK: (from_disk + from_host - left) / rates.link_bytes_per_s,
        Resource.COMPUTE: _compute_s(model, placement, rates, load)
        + decode_s * (1.0 if placement.ring_slots < SLOTS_TO_DECODE else rates.decode_slowdown)
        + rates.compute_lost_to_reads * disk_s,
        Resource.KV_LINK: 0.0,
        Resource.HOST_ATTENTION: 0.0,
        Resource.HOST_EXPERTS: experts_s,
    }
    if placement.kv_home is KvHome.STREAMED and overlaps:
        # The weights use the same link: the cache comes on top of them.
        seconds[Resource.KV_LINK] = seconds[Resource.LINK] + kv_bytes / rates.link_bytes_per_s
    if placement.kv_home is KvHome.HOST and overlaps:
        seconds[Resource.HOST_ATTENTION] = kv_bytes / rates.host_memory_bytes_per_s
    transfer = max(seconds[name] for name in (*_TRANSFERS, Resource.KV_LINK))
    slots, work_s = placement.ring_slots, seconds[Resource.COMPUTE]
    if decode_s and slots == SLOTS_TO_DECODE:
        slots, work_s = slots - 1, work_s + decode_s
    shown = JITTER_SHARE.get(slots, 0.0) * min(transfer, work_s)
    return PassCost(seconds=tuple(seconds.items()), total_s=max(seconds.values()) + shown)


def host_experts_share(
    model: ModelShape, placement: Placement, rates: Rates, load: PassLoad
) -> tuple[int, float]:
    """What the host computes of a pass: (bytes that are not fetched for it, its seconds)."""
    if not placement.host_experts:
        return 0, 0.0
    costs, cut = host_costs(rates), placement.parts(load.tokens, load.kv_tokens)
    start, left, seconds = placement.resident_layers, 0, 0.0
    for layer in model.layers[start : start + placement.host_layers]:
        if not layer.experts:
            continue
        expert = layer.experts[0]
        hit = distinct_experts(len(layer.experts), layer.top_k, cut[1])
        work = ExpertWork(
            unit=expert.name,
            num_bytes=expert.record_bytes(placement.precision),
            num_weights=expert.linear_weights,
            row_bytes=model.expert_row_bytes,
            rows=max(1, round(cut[1] * layer.top_k / hit)),
        )
        count = num_for_host(round(placement.missed_experts(layer, model, cut)), work, costs)
        left += count * work.num_bytes
        seconds += count * compute_s(work, costs)
    return left, seconds


def host_costs(rates: Rates) -> HostExpertsPlan:
    """What decides, visit by visit, whether the host computes an expert."""
    return HostExpertsPlan(
        link_bytes_per_s=rates.link_bytes_per_s,
        host_bytes_per_s=rates.host_memory_bytes_per_s,
        host_flops_per_s=rates.host_flops_per_s,
    )


def _decode_s(placement: Placement, rates: Rates, from_disk: int) -> float:
    if placement.compression is Compression.NONE:
        return 0.0
    return from_disk / (rates.decode_bytes_per_s or 1.0)  # a year, where it cannot be done


def _compute_s(model: ModelShape, placement: Placement, rates: Rates, load: PassLoad) -> float:
    read = load.rows * load.context_tokens * model.kv_bytes_per_token
    decode_s = read / (rates.attention_bytes_per_s or rates.memory_bytes_per_s)
    if placement.kv_home is KvHome.HOST and not rates.device_is_host:
        decode_s = 0.0
    pairs = load.prompt_tokens * load.prompt_context_tokens
    prompt_s = pairs * model.attention_flops_per_pair / rates.gemm[-1].flops_per_s
    count, tokens = placement.parts(load.tokens, load.kv_tokens)
    if placement.kv_home is KvHome.STREAMED and rates.device_is_host:
        # Back go the blocks that were written: a decoding row takes the rest of its block along.
        moved = load.kv_tokens + load.rows * BLOCK_TOKENS + load.prompt_tokens
        copied = moved * model.kv_bytes_per_token
        decode_s += copied / (rates.kv_copy_bytes_per_s or rates.link_bytes_per_s)
        decode_s += count * len(model.layers) * rates.kv_window_s
    more_s = (count - 1) * (rates.part_overhead_s or rates.layer_overhead_s)
    one_s = sum(_layer_s(layer, placement.precision, rates, tokens) for layer in model.layers)
    return (
        count * one_s
        + len(model.layers) * (rates.layer_overhead_s + more_s)
        + rates.gemm_s(model.head_weights, load.rows)
        + decode_s
        + prompt_s
        + rates.row_value_s * (load.tokens * model.row_values + load.rows * model.logits)
    )


def _layer_s(layer: LayerShape, precision: Precision, rates: Rates, tokens: int) -> float:
    """Products of one layer; of its experts, those that routing hits, each with its rows."""
    weights = layer.base.linear_weights
    seconds = rates.gemm_s(weights, tokens, precision)
    if layer.experts:
        hit = distinct_experts(len(layer.experts), layer.top_k, tokens)
        weights = round(hit * layer.experts[0].linear_weights)
        rows = max(1, round(tokens * layer.top_k / hit))
        seconds += rates.gemm_s(weights, rows, precision)
    return seconds


def balance_tokens(model: ModelShape, placement: Placement, rates: Rates) -> int:
    """The largest pass, in tokens, that the transfers still hide: B* = S x F / (2 P x BW).

    Below it every token more (a prompt chunk, a draft to verify) is free. At least 1; no more
    than `MAX_BALANCE_TOKENS`.
    """
    low, high = 1, MAX_BALANCE_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        load = PassLoad(rows=1, context_tokens=0, prompt_tokens=middle - 1)
        time = pass_time(model, placement, rates, load)
        if dict(time.seconds)[Resource.COMPUTE] <= time.transfer_s:
            low = middle
        else:
            high = middle - 1
    return low


def time_to_first_token_s(
    model: ModelShape, placement: Placement, rates: Rates, *, prompt_tokens: int, chunk: int
) -> float:
    """An idle replica's first token: one pass for each chunk of the prompt."""
    total, done = 0.0, 0
    while done < prompt_tokens:
        size = min(chunk, prompt_tokens - done)
        load = PassLoad(
            rows=1,
            context_tokens=0,
            prompt_tokens=size - 1,
            prompt_context_tokens=done + size // 2,
        )
        total += pass_time(model, placement, rates, load).total_s
        done += size
    return total
