"""What a policy search may choose from, and every placement that this allows. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from offload.compression import Compression
from offload.homes import KvHome, Placement, staging_slots
from offload.model_shape import ModelShape
from offload.precision import Precision

MAX_RESIDENT_CHOICES = 65
"""Deep models are tried with so many numbers of resident layers, evenly spread."""
HELD_PARTS = 4
"""Of the memory of layers that stay, none or so many parts are tried for compressed records."""
KV_WINDOWS = 2
"""One micro-batch computes while the next one's keys and values arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Bytes of one rank that may be used."""

    device_bytes: int
    """Resident weights, ring, KV cache and workspace."""
    workspace_bytes: int
    """Part of `device_bytes` that the computation of a step takes."""
    host_bytes: int
    """Host memory for streamed weights and staging, and for a KV cache that is at home there."""
    host_holds_weights: bool = True
    """False on a CPU replica: what its one memory holds of the weights is resident."""
    kv_bytes: int | None = None
    """Size of the KV cache; None: what the weights leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """How much of a step a layer computes at a time, and what that takes of the device."""

    micro_batch_tokens: int
    """0: the whole step."""
    workspace_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of the replica."""

    max_rows: int
    """Requests that may run at one time."""
    context_tokens: int
    """Tokens that one of them holds on average."""
    max_context: int
    """Tokens of the longest; the cache must hold one such request."""
    prompt_tokens: int = 512
    """Prompt length for which the time to the first token is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What may be chosen; one entry where the user has decided."""

    precisions: tuple[Precision, ...] = (Precision.NATIVE,)
    compressions: tuple[Compression, ...] = (Compression.NONE,)
    """Of native records; codes get no smaller."""
    may_hold: bool = False
    """Whether parts of compressed records may stay in memory in place of whole layers."""
    ring_slots: tuple[int, ...] = (2, 3, 4)
    expert_shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625, 0.0)
    """Parts of the streamed routed experts that slots are tried for."""
    resident_layers: int | None = None
    """None: free."""
    host_experts: tuple[bool, ...] = (False,)
    """Whether the host may compute experts; only of native ones, as no kernel of the host's keeps
    codes in its caches there."""
    kv_homes: tuple[KvHome, ...] = (KvHome.DEVICE,)
    window_requests: tuple[int, ...] = (1, 2, 4, 8)
    """Requests of the greatest length that a window of a streamed cache is tried with."""
    activations: tuple[Activations, ...] = ()
    """Empty: whole steps, in the workspace of the budgets."""
    max_chunk: int = 131_072
    """Most tokens of a pass."""


def activations(budgets: Budgets, choices: Choices) -> tuple[Activations, ...]:
    """Ways to cut a step."""
    whole = Activations(micro_batch_tokens=0, workspace_bytes=budgets.workspace_bytes)
    return choices.activations or (whole,)


def placements(
    model: ModelShape, budgets: Budgets, demand: Demand, choices: Choices
) -> Iterator[Placement]:
    """All homes of weights and KV cache that the choices allow."""
    for base in _weight_homes(model, choices):
        for placement in _kv_homes(base, demand, choices):
            homed = _with_host_homes(model, placement, budgets)
            yield from _host_experts(model, homed, choices)


def _weight_homes(model: ModelShape, choices: Choices) -> Iterator[Placement]:
    layers = len(model.layers)
    fixed_or_not = (True, False)
    for (precision, compression), slots, fixed in itertools.product(
        _formats(choices), choices.ring_slots, fixed_or_not
    ):
        for resident in _resident_choices(model, choices.resident_layers):
            base = Placement(
                resident_layers=resident,
                host_layers=0,
                fixed_resident=fixed,
                precision=precision,
                compression=compression,
                ring_slots=slots,
            )
            if slots <= layers - resident:
                yield from _expert_homes(model, base, choices)
            if choices.may_hold:
                yield from _held(model, base)


def _held(model: ModelShape, base: Placement) -> Iterator[Placement]:
    """The memory of some or all layers that stay, for a part of each other layer's record instead:
    a third less to read, and more to decode."""
    if base.compression is Compression.NONE:
        return
    stays = {base.resident_layers * part // HELD_PARTS for part in range(HELD_PARTS)}
    for resident in sorted(stays - {base.resident_layers}):
        streaming = replace(base, resident_layers=resident)
        layers = model.layers[resident : base.resident_layers]
        room = sum(layer.record_bytes(base.precision) for layer in layers)
        most = streaming.read_bytes(model, streaming.streamed_bytes(model, 1)[0])
        if room <= most and base.ring_slots <= len(model.layers) - resident:
            yield replace(streaming, held_bytes=room)


def _formats(choices: Choices) -> Iterator[tuple[Precision, Compression]]:
    for precision in choices.precisions:
        native = precision is Precision.NATIVE
        for compression in choices.compressions if native else (Compression.NONE,):
            yield precision, compression


def _kv_homes(base: Placement, demand: Demand, choices: Choices) -> Iterator[Placement]:
    """With each home of the KV cache, and each size of windows where it is streamed."""
    for home in choices.kv_homes:
        if home is not KvHome.STREAMED:
            yield replace(base, kv_home=home)
            continue
        for requests in choices.window_requests:
            yield replace(
                base,
                kv_home=home,
                kv_windows=KV_WINDOWS,
                kv_window_tokens=requests * demand.max_context,
            )


def _expert_homes(model: ModelShape, base: Placement, choices: Choices) -> Iterator[Placement]:
    """With each number of expert slots, for a model whose streamed layers have routed experts."""
    count = base.streamed_experts(model)
    if not count:
        yield base
        return
    least = least_expert_slots(model)
    for slots in sorted({max(least, round(share * count)) for share in choices.expert_shares}):
        for bases_resident in (False, True):
            yield replace(base, expert_slots=min(slots, count), bases_resident=bases_resident)


def least_expert_slots(model: ModelShape) -> int:
    """Slots without which streaming experts makes no sense: one token's, and one to read into."""
    return 1 + max((layer.top_k for layer in model.layers), default=0)


def _resident_choices(model: ModelShape, wanted: int | None) -> Sequence[int]:
    """Of a mixture none unless asked: slots hold what is visited, in any layer."""
    layers = len(model.layers)
    if wanted is not None:
        return (wanted,)
    if any(layer.experts for layer in model.layers):
        return (0,)
    if layers <= MAX_RESIDENT_CHOICES:
        return range(layers)
    steps = MAX_RESIDENT_CHOICES - 1
    return sorted({(layers - 1) * step // steps for step in range(steps + 1)})


def _with_host_homes(model: ModelShape, base: Placement, budgets: Budgets) -> Placement:
    """As much of what streams as host memory holds: a link is never slower than disk and link.

    None beside a KV cache there, which serves demand better.
    """
    if not budgets.host_holds_weights or base.kv_home is not KvHome.DEVICE:
        return base
    sizes = [layer.record_bytes(base.precision) for layer in model.layers[base.resident_layers :]]
    if not base.fixed_resident:
        beside = replace(base, fixed_on_host=True)
        base = beside if host_bytes_of(model, beside) <= budgets.host_bytes else base
    every = replace(base, host_layers=len(sizes))
    if host_bytes_of(model, every) <= budgets.host_bytes:
        return every
    room = budgets.host_bytes - host_bytes_of(model, base)
    count = 0
    for size in sizes:
        room -= size
        if room < 0:
            break
        count += 1
    return replace(base, host_layers=count)


def _host_experts(model: ModelShape, base: Placement, choices: Choices) -> Iterator[Placement]:
    """Computed by the host or not, where it holds any that it could compute."""
    start = base.resident_layers
    homes = model.layers[start : start + base.host_layers]
    able = base.precision is Precision.NATIVE and any(layer.experts for layer in homes)
    for wanted in choices.host_experts:
        if able or not wanted:
            yield replace(base, host_experts=wanted)


def host_bytes_of(model: ModelShape, placement: Placement) -> int:
    """Host bytes beside a device: layers that live there and staging for those on disk; not less
    than the largest record that stays, as it is loaded through there."""
    start = placement.resident_layers
    homes = model.layers[start : start + placement.host_layers]
    on_disk = model.layers[start + placement.host_layers :]
    precision = placement.precision
    held = sum(layer.record_bytes(precision) for layer in homes)
    held += model.fixed_bytes if placement.fixed_on_host else 0
    fixed_on_disk = not placement.fixed_resident and not placement.fixed_on_host
    if fixed_on_disk or (on_disk and not placement.bases_resident):
        held += staging_slots(placement.ring_slots) * placement.slot_bytes(model)
    if any(layer.experts for layer in on_disk):
        held += staging_slots(placement.expert_slots) * placement.expert_slot_bytes(model)
    resident = [unit for layer in model.layers[:start] for unit in layer.units]
    if placement.bases_resident:
        resident += [layer.base for layer in model.layers[start:]]
    loaded = [unit.record_bytes(precision) for unit in resident]
    if placement.fixed_resident:
        loaded += [unit.native_bytes for unit in model.fixed_units]
    return max(held, *loaded, 0)
