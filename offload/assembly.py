"""One rank's streamed weights put together: store, budgets, reader, ring."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from cluster.base.amount_text import size_text
from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError
from cluster.base.plan import OffloadPlan
from offload.awaited_units import Tensors
from offload.checkpoint_store import READER, CheckpointStore
from offload.compression import DTYPE, Compression, RecordCodec
from offload.expert_cache import ExpertCache
from offload.gathered_units import Residents, open_gathered, piece_of
from offload.held_heads import open_heads
from offload.homes import KvHome
from offload.host_experts import HostExperts
from offload.kv_windows import KvWindows
from offload.layout import Store
from offload.lockstep_ring import LockstepRing
from offload.lossless_library import open_codec
from offload.opening import Opening
from offload.pack import StoreRequest, ensure_store
from offload.packers import NativePacker, Packer
from offload.placement import Placement, place_units
from offload.plan_check import check_plan
from offload.precision import Precision
from offload.provider import StreamedWeights
from offload.quant_kernels import QuantKernels, QuantPacker
from offload.readers.choose import OpenEngine, choose_reader, openers
from offload.reservations import reserve_all
from offload.ring import Ring
from offload.runtime import Runtime
from offload.schedule import build_schedule
from offload.zigzag import ZigzagModel
from replicas.kernels.ops import Kernels
from replicas.layers.weights import WeightProvider
from replicas.models.context import torch_dtype
from replicas.models.decoder import DecoderModel, LayeredModel
from replicas.worker.assembly import ModelAdapter, WeightsFactory, WeightsRequest

_log = logging.getLogger(__name__)


def streamed_weights(plan: OffloadPlan, runtime: Runtime | None = None) -> WeightsFactory:
    """The `WeightsFactory` of an offload replica.

    It packs the checkpoint when `plan.disk_path` has no store for it yet. Its errors:

    Raises:
        ConfigError: the budgets cannot hold it, the disk is too small, no reader works.
        CorruptWeightsError: checkpoint or store are damaged.
        WeightStreamError: the store cannot be read.
    """
    runtime = runtime or Runtime(cache_dir=default_cache_dir())

    def make(request: WeightsRequest) -> WeightProvider:
        has_stages = runtime.streams_of(request.device) is not None
        check_plan(plan, request, has_stages=has_stages)
        wanted = StoreRequest(
            model_path=request.spec.model_path,
            units=request.model.units,
            dtype=request.spec.dtype,
            packer=make_packer(request.model.kernels, torch_dtype(request.spec.dtype)),
            disk_path=plan.disk_path,
            rank=request.rank,
            size=request.size,
            codec=codec_of(plan, request.spec.dtype, runtime.cache_dir / "kernels"),
            piece=piece_of(plan, request),
        )
        if plan.is_packed:
            store = ensure_store(wanted, request.on_progress)
            engines = openers(store.path, runtime.cache_dir)
        else:
            source = CheckpointStore(wanted)
            store, engines = source.store, {READER: source.opener}
        placement = place_units(store, plan)
        reserve_all(plan, placement, request, has_stages=has_stages)
        return open_weights(store, placement, plan, runtime, request, engines)

    return make


def make_packer(kernels: Kernels, dtype: torch.dtype) -> Packer:
    """What lays weights out for `kernels`."""
    if isinstance(kernels, QuantKernels):
        return QuantPacker(kernels, dtype)
    return NativePacker(kernels, dtype)


def codec_of(plan: OffloadPlan, dtype: str, cache_dir: Path) -> RecordCodec | None:
    """What this plan's records are compressed with.

    Args:
        cache_dir: where it is kept once it is compiled.

    Raises:
        ConfigError: the compression is not known, not for such weights, or cannot be compiled.
    """
    if plan.compression not in list(Compression):
        known = ", ".join(Compression)
        raise ConfigError(
            f"compression {plan.compression!r} is not known.", f"Use {known}.", param="compression"
        )
    if plan.compression == Compression.NONE:
        return None
    if plan.precision != Precision.NATIVE or dtype != DTYPE:
        raise ConfigError(
            f"{plan.precision} weights in {dtype} do not get smaller: only native {DTYPE} does.",
            "Set compression to none.",
            param="compression",
        )
    return open_codec(cache_dir)


def kernel_adapter(plan: OffloadPlan) -> Callable[[Kernels], Kernels] | None:
    """What a model's kernels must be wrapped in to compute with this plan's weights.

    Raises:
        ConfigError: the precision is not known.
    """
    if plan.precision not in list(Precision):
        known = ", ".join(Precision)
        raise ConfigError(
            f"precision {plan.precision!r} is not known.", f"Use {known}.", param="precision"
        )
    precision = Precision(plan.precision)
    if precision is Precision.NATIVE:
        return None
    return lambda base: QuantKernels(base, precision, default_cache_dir() / "kernels")


def model_adapter(plan: OffloadPlan, runtime: Runtime | None = None) -> ModelAdapter | None:
    """What runs the layers of a model as the plan says; None: each once, for the whole step."""
    runtime = runtime or Runtime(cache_dir=default_cache_dir())
    if plan.kv_home != KvHome.STREAMED:
        if not plan.micro_batch_tokens:
            return None
        return lambda model, _: ZigzagModel(model, plan.micro_batch_tokens)

    def adapt(model: LayeredModel, kv_caches: Sequence[torch.Tensor]) -> DecoderModel:
        windows = KvWindows(
            kv_caches, plan.kv_windows, plan.kv_window_blocks, poison=runtime.poison
        )
        return ZigzagModel(model, plan.micro_batch_tokens, windows)

    return adapt


def open_weights(
    store: Store,
    placement: Placement,
    plan: OffloadPlan,
    runtime: Runtime,
    request: WeightsRequest,
    engines: Mapping[str, OpenEngine],
) -> StreamedWeights:
    """Resident units in memory, ring and expert cache running.

    Args:
        engines: the readers that there are for the store.

    Raises:
        ConfigError: no reader works, or the ranks cannot share memory.
        CorruptWeightsError, WeightStreamError: the store cannot be read.
    """
    device = request.device
    reader = READER if READER in engines else choose_reader(plan.reader, store.path, engines)
    with ExitStack() as opened:
        opening = Opening(
            store, plan, runtime, device, reader=reader, engines=engines, opened=opened
        )
        has_stages = runtime.streams_of(device) is not None
        # A device's pass through host memory that is the slots' afterwards.
        resident = opening.resident(placement.resident) if has_stages else {}
        pinned = opening.pinned(placement.host)
        ring: Ring | LockstepRing | None = None
        experts = None
        gathered: Mapping[str, Tensors] = {}
        if plan.num_sharing > 1 and request.sharers is not None:
            gathered, ring = open_gathered(opening, store, placement, plan, request.sharers)
        elif placement.ring:
            num_slots = placement.ring_room.num_slots
            depth = min(plan.prefetch_depth, num_slots)
            schedule = build_schedule(placement.ring, num_slots, depth)
            heads = open_heads(placement.head_bytes)
            ring = Ring(schedule, opening.link(placement.ring_room, pinned, heads))
        if placement.experts:
            link = opening.link(placement.expert_room, pinned)
            costs = plan.host_experts
            host = None if costs is None else HostExperts(store, _routed(pinned), costs)
            experts = ExpertCache(placement.experts, placement.expert_room.num_slots, link, host)
        if not has_stages:
            # Last: units that arrive make pages, and the slots' huge pages would wait for them.
            own = tuple(unit for unit in placement.resident if unit not in gathered)
            resident = opening.resident(own)
        if gathered:
            resident = Residents(gathered, resident)
        closing = opened.pop_all()
    _log_placement(placement, reader)
    return StreamedWeights(resident, ring, experts, reader=reader, on_close=closing.close)


def _routed(pinned: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    return {unit: memory for unit, memory in pinned.items() if ".expert." in unit}


def _log_placement(placement: Placement, reader: str) -> None:
    _log.info(
        "weights: %d units resident (%s), %d in host memory, %d streamed by %s through %d slots of "
        "%s beside %s of their records held, %d experts through %d slots",
        len(placement.resident),
        size_text(placement.resident_bytes),
        len(placement.host),
        len(placement.ring),
        reader,
        placement.ring_room.num_slots,
        size_text(placement.ring_room.slot_bytes),
        size_text(placement.held_bytes),
        len(placement.experts),
        placement.expert_room.num_slots,
    )
