"""Where one rank's weights, keys and values are, and the bytes that follow from it. Torch-free."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from offload.compression import Compression
from offload.model_shape import LayerShape, ModelShape
from offload.precision import Precision

MAX_STAGING = 4
"""Records that are read, or copied to the device, at one time."""


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
    fixed_on_host: bool = False
    """Of fixed units that stream: from host memory, not from disk."""
    precision: Precision = Precision.NATIVE
    """Of all layers, wherever they are: answers do not depend on the budget."""
    compression: Compression = Compression.NONE
    """Of all records in the store; memory holds what they decode to."""
    held_bytes: int = 0
    """Of the streamed layers' compressed records, what stays in memory as it is stored."""
    ring_slots: int = 3
    bases_resident: bool = False
    """Of mixture layers that stream only the routed experts do; the rest of them stays."""
    expert_slots: int = 0
    """Places for routed experts of layers that are not resident."""
    host_experts: bool = False
    """Routed experts in host memory may be computed there."""
    kv_home: KvHome = KvHome.DEVICE
    kv_windows: int = 0
    """Micro-batches whose keys and values of a layer are on the device at one time; 0 unless the
    cache is streamed."""
    kv_window_tokens: int = 0
    """Tokens whose keys and values a window holds."""
    micro_batch_tokens: int = 0
    """Most tokens that a layer computes at a time; 0: all of a step's."""

    def parts(self, tokens: int, kv_tokens: int = 0) -> tuple[int, int]:
        """A pass of `tokens` tokens as (micro-batches, tokens of one of them).

        Args:
            kv_tokens: those whose keys and values the pass attends to.
        """
        count = -(-tokens // self.micro_batch_tokens) if self.micro_batch_tokens else 1
        if self.kv_windows:
            count = max(count, -(-kv_tokens // self.kv_window_tokens))
        count = max(1, min(count, tokens))
        return count, -(-tokens // count)

    def window_bytes(self, model: ModelShape) -> int:
        """Device bytes of all windows of the KV cache, each for one layer."""
        layer_bytes = -(-model.kv_bytes_per_token // len(model.layers))
        return self.kv_windows * self.kv_window_tokens * layer_bytes

    def stored_share(self, model: ModelShape) -> float:
        """Of the bytes that come from disk, what is read."""
        return model.stored_share if self.compression is Compression.LOSSLESS else 1.0

    def read_bytes(self, model: ModelShape, from_disk: float) -> float:
        """What the disk is asked for when a pass brings `from_disk` bytes of weights from there."""
        return max(0.0, from_disk * self.stored_share(model) - self.held_bytes)

    def streamed_bytes(self, model: ModelShape, tokens: int, kv_tokens: int = 0) -> tuple[int, int]:
        """Bytes that one pass of `tokens` tokens brings from (disk, host memory); see `parts`.

        Of routed experts those that uniform routing hits and that are not in a slot: a skewed
        routing hits fewer and finds more of them, so this errs on the slow side.
        """
        missed = self._missed_share(model)
        cut = self.parts(tokens, kv_tokens)
        sizes = [self._read_bytes(layer, cut, missed) for layer in model.layers]
        first_disk = self.resident_layers + self.host_layers
        fixed = 0 if self.fixed_resident else model.fixed_read_bytes
        from_disk = round(sum(sizes[first_disk:]))
        from_host = round(sum(sizes[self.resident_layers : first_disk]))
        if self.fixed_on_host:
            return from_disk, from_host + fixed
        return from_disk + fixed, from_host

    def missed_experts(self, layer: LayerShape, model: ModelShape, cut: tuple[int, int]) -> float:
        """Experts of a streamed layer that a pass visits and finds in no slot; `cut` by `parts`."""
        count, tokens = cut
        visited = count * distinct_experts(len(layer.experts), layer.top_k, tokens)
        return visited * self._missed_share(model)

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
        """Device bytes of resident weights, ring, what is held of records, expert slots and windows
        of the KV cache."""
        slots = self.ring_slots * self.slot_bytes(model) + self.held_bytes
        slots += self.expert_slots * self.expert_slot_bytes(model)
        return self.resident_bytes(model) + slots + self.window_bytes(model)

    def _missed_share(self, model: ModelShape) -> float:
        """Of visits to streamed experts, those that find it in no slot when all are as likely."""
        streamed = self.streamed_experts(model)
        return max(0.0, 1 - self.expert_slots / streamed) if streamed else 0.0

    def _read_bytes(self, layer: LayerShape, cut: tuple[int, int], missed: float) -> float:
        base = 0 if self.bases_resident else layer.base.record_bytes(self.precision)
        if not layer.experts:
            return base
        # Each micro-batch visits its own; the layer's other weights serve all of them.
        count, tokens = cut
        visited = count * distinct_experts(len(layer.experts), layer.top_k, tokens)
        visited /= len(layer.experts)
        return base + visited * missed * layer.expert_bytes(self.precision)


def staging_slots(num_slots: int) -> int:
    """Host slots for records from disk on their way to so many slots of a device.

    Two keep disk and link busy at the same time, further ones take up what either is late; an
    expert cache's many slots need no more.
    """
    return min(num_slots, MAX_STAGING)


def distinct_experts(num_experts: int, top_k: int, tokens: int) -> float:
    """Experts of a layer that `tokens` tokens hit when routing is uniform: E (1 - (1 - k/E)^T)."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)
