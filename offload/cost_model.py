"""Seconds of one pass over a model whose weights are streamed: closed forms, torch-free.

Everything overlaps, so a pass takes as long as its busiest resource:

    t = max( S_disk / BW_disk, S_link / BW_link, C, KV_link / BW_link, A_host )

S: bytes streamed in a pass after quantisation. C: the device's own work, one thing after another:
multiplications with weights as they are stored, attention over the KV cache it holds.
tokens/s = batch / t; with S / BW the largest term this is ZeRO-Inference's rule: throughput is
batch x link / model.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from offload.model_shape import LayerShape, ModelShape
from offload.precision import Precision
from offload.rates import Rates

MAX_BALANCE_TOKENS = 131_072
"""No pass is made larger than this, however slow the link is."""
JITTER_SHARE = {1: 1.0, 2: 0.06}
"""Share of the shorter of transfer and compute that a ring of so many slots fails to hide: all of
it with one slot; with two a late transfer is felt (measured 1 % on a quiet machine, 12-19 % on a
loaded one); three or more absorb it."""


class Resource(enum.StrEnum):
    """What a pass can be bound by."""

    DISK = "disk"
    LINK = "host to device link"
    COMPUTE = "device compute"
    KV_LINK = "KV cache over the link"
    HOST_ATTENTION = "host attention"


class KvHome(enum.StrEnum):
    """Where keys and values live, and so who computes attention over them."""

    DEVICE = "device"
    HOST = "host"
    """In host memory, attention by the host's cores."""
    STREAMED = "streamed"
    """In host memory, brought over the link in every pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the weights of one rank are, in what format, and how the ring is cut."""

    resident_layers: int
    """The first so many layers stay on the device."""
    host_layers: int
    """The next so many stream from host memory, the rest from disk."""
    fixed_resident: bool = True
    precision: Precision = Precision.NATIVE
    """Of all layers, wherever they are: answers do not depend on the budget."""
    ring_slots: int = 3
    bases_resident: bool = False
    """Of mixture layers that stream only the routed experts do; the rest of them stays."""
    expert_slots: int = 0
    """Places for routed experts of layers that are not resident."""
    kv_home: KvHome = KvHome.DEVICE

    def streamed_bytes(self, model: ModelShape, tokens: int) -> tuple[int, int]:
        """Bytes that one pass of `tokens` tokens reads from (disk, host memory).

        Of routed experts those that uniform routing hits and that are not in a slot: a skewed
        routing hits fewer and finds more of them, so this errs on the slow side.
        """
        missed = self._missed_share(model)
        sizes = [self._read_bytes(layer, tokens, missed) for layer in model.layers]
        first_disk = self.resident_layers + self.host_layers
        fixed = 0 if self.fixed_resident else model.fixed_read_bytes
        from_disk = round(sum(sizes[first_disk:])) + fixed
        return from_disk, round(sum(sizes[self.resident_layers : first_disk]))

    def slot_bytes(self, model: ModelShape) -> int:
        """The largest record that passes through the ring; 0 when nothing does."""
        streamed = model.layers[self.resident_layers :]
        sizes = [layer.base.record_bytes(self.precision) for layer in streamed]
        sizes = [] if self.bases_resident else sizes
        if not self.fixed_resident:
            sizes += [unit.native_bytes for unit in model.fixed_units]
        return max(sizes, default=0)

    def expert_slot_bytes(self, model: ModelShape) -> int:
        """The largest routed expert that streams; 0 when none does."""
        streamed = model.layers[self.resident_layers :]
        return max((layer.largest_expert_bytes(self.precision) for layer in streamed), default=0)

    def streamed_experts(self, model: ModelShape) -> int:
        """Routed experts of the layers that are not resident."""
        return sum(len(layer.experts) for layer in model.layers[self.resident_layers :])

    def resident_bytes(self, model: ModelShape) -> int:
        """Device bytes of the weights that stay."""
        resident, streamed = (
            model.layers[: self.resident_layers],
            model.layers[self.resident_layers :],
        )
        held = sum(layer.record_bytes(self.precision) for layer in resident)
        if self.bases_resident:
            held += sum(layer.base.record_bytes(self.precision) for layer in streamed)
        return held + (model.fixed_bytes if self.fixed_resident else 0)

    def weight_bytes(self, model: ModelShape) -> int:
        """Device bytes of resident weights, ring and expert slots."""
        slots = self.ring_slots * self.slot_bytes(model)
        slots += self.expert_slots * self.expert_slot_bytes(model)
        return self.resident_bytes(model) + slots

    def _missed_share(self, model: ModelShape) -> float:
        """Of visits to streamed experts, those that find it in no slot when all are as likely."""
        streamed = self.streamed_experts(model)
        return max(0.0, 1 - self.expert_slots / streamed) if streamed else 0.0

    def _read_bytes(self, layer: LayerShape, tokens: int, missed: float) -> float:
        base = 0 if self.bases_resident else layer.base.record_bytes(self.precision)
        if not layer.experts:
            return base
        visited = distinct_experts(len(layer.experts), layer.top_k, tokens) / len(layer.experts)
        return base + visited * missed * layer.expert_bytes(self.precision)


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
        """The busier of disk and link."""
        return max(seconds for name, seconds in self.seconds if name in _TRANSFERS)


_TRANSFERS = (Resource.DISK, Resource.LINK)


def pass_time(model: ModelShape, placement: Placement, rates: Rates, load: PassLoad) -> PassCost:
    """Seconds of one pass of `load` over the model."""
    from_disk, from_host = placement.streamed_bytes(model, load.tokens)
    kv_bytes = load.rows * load.context_tokens * model.kv_bytes_per_token
    seconds = {
        Resource.DISK: from_disk / rates.disk_bytes_per_s,
        Resource.LINK: (from_disk + from_host) / rates.link_bytes_per_s,
        Resource.COMPUTE: _compute_s(model, placement, rates, load),
        Resource.KV_LINK: 0.0,
        Resource.HOST_ATTENTION: 0.0,
    }
    if placement.kv_home is KvHome.STREAMED:
        # The weights use the same link: the cache comes on top of them.
        seconds[Resource.KV_LINK] = seconds[Resource.LINK] + kv_bytes / rates.link_bytes_per_s
    if placement.kv_home is KvHome.HOST:
        seconds[Resource.HOST_ATTENTION] = kv_bytes / rates.host_memory_bytes_per_s
    transfer = max(seconds[Resource.DISK], seconds[Resource.LINK], seconds[Resource.KV_LINK])
    shown = JITTER_SHARE.get(placement.ring_slots, 0.0) * min(transfer, seconds[Resource.COMPUTE])
    return PassCost(seconds=tuple(seconds.items()), total_s=max(seconds.values()) + shown)


def _compute_s(model: ModelShape, placement: Placement, rates: Rates, load: PassLoad) -> float:
    decode_s = 0.0
    if placement.kv_home is not KvHome.HOST:
        read = load.rows * load.context_tokens * model.kv_bytes_per_token
        decode_s = read / rates.memory_bytes_per_s
    pairs = load.prompt_tokens * load.prompt_context_tokens
    prompt_s = pairs * model.attention_flops_per_pair / rates.gemm[-1].flops_per_s
    return (
        sum(_layer_s(layer, placement.precision, rates, load.tokens) for layer in model.layers)
        + rates.gemm_s(model.head_weights, load.rows)
        + decode_s
        + prompt_s
        + rates.layer_overhead_s * len(model.layers)
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


def distinct_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Experts of a layer that `tokens` tokens hit when routing is uniform: E (1 - (1 - k/E)^T)."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


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
