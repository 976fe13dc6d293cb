"""One rank's streamed weights put together: store, budgets, reader, ring."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError, InternalError
from cluster.base.plan import OffloadPlan
from cluster.base.quantities import size_text
from offload.budget import Budget
from offload.expert_cache import ExpertCache
from offload.host_link import VERIFY, HostLink
from offload.layout import Store
from offload.pack import NativePacker, Packer, StoreRequest, ensure_store
from offload.placement import Placement, place_units, reserve
from offload.precision import Precision
from offload.provider import StreamedWeights
from offload.quant_kernels import QuantKernels, QuantPacker
from offload.readers.choose import choose_reader, openers
from offload.readers.engine import ReadEngine, ReaderUnavailableError
from offload.ring import Ring
from offload.schedule import build_schedule
from replicas.kernels.ops import Kernels
from replicas.layers.weights import WeightProvider
from replicas.models.context import torch_dtype
from replicas.worker.assembly import WeightsFactory, WeightsRequest

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a plan leaves to the machine, and what tests want to see."""

    cache_dir: Path
    """Where compiled readers are kept."""
    poison: bool = False
    """Overwrite what was released with NaN."""
    wrap_engine: Callable[[ReadEngine], ReadEngine] = lambda engine: engine


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
        _check(plan, request)
        store = ensure_store(
            StoreRequest(
                model_path=request.spec.model_path,
                units=request.model.units,
                dtype=request.spec.dtype,
                packer=make_packer(request.model.kernels, torch_dtype(request.spec.dtype)),
                disk_path=plan.disk_path,
                rank=request.rank,
                size=request.size,
            ),
            request.on_progress,
        )
        placement = place_units(store, plan)
        reserve(Budget("device_memory", plan.device_bytes), placement, plan, request.kv_bytes)
        return open_weights(store, placement, plan, runtime)

    return make


def make_packer(kernels: Kernels, dtype: torch.dtype) -> Packer:
    """What lays weights out for `kernels`."""
    if isinstance(kernels, QuantKernels):
        return QuantPacker(kernels, dtype)
    return NativePacker(kernels, dtype)


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


def open_weights(
    store: Store, placement: Placement, plan: OffloadPlan, runtime: Runtime
) -> StreamedWeights:
    """Resident units in memory, ring and expert cache running.

    Raises:
        ConfigError: no reader works.
        CorruptWeightsError, WeightStreamError: the store cannot be read.
    """
    engines = openers(store.path, runtime.cache_dir)
    reader = choose_reader(plan.reader, store.path, engines)
    with ExitStack() as opened:
        resident = _load_resident(store, placement, reader, plan, runtime)

        def link(num_slots: int, slot_bytes: int) -> HostLink:
            engine = runtime.wrap_engine(engines[reader](num_slots))
            opened.callback(engine.close)
            memory = _allocate(engine, num_slots * slot_bytes)
            slots = [memory[at * slot_bytes : (at + 1) * slot_bytes] for at in range(num_slots)]
            return HostLink(
                store,
                engine,
                slots,
                verify=plan.verify,
                timeout_s=plan.read_timeout_s,
                poison=runtime.poison,
            )

        ring = experts = None
        if placement.ring:
            depth = min(plan.prefetch_depth, placement.ring_slots)
            schedule = build_schedule(placement.ring, placement.ring_slots, depth)
            ring = Ring(schedule, link(placement.ring_slots, placement.ring_slot_bytes))
        if placement.experts:
            slots = placement.expert_slots
            cached = link(slots, placement.expert_slot_bytes)
            experts = ExpertCache(placement.experts, slots, cached)
        closing = opened.pop_all()
    _log_placement(placement, reader)
    return StreamedWeights(resident, ring, experts, reader=reader, on_close=closing.close)


def _load_resident(
    store: Store, placement: Placement, reader: str, plan: OffloadPlan, runtime: Runtime
) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """Tensors of the resident units, read once into memory of exactly their size."""
    numbers = sorted({store.by_name[unit].record for unit in placement.resident})
    if not numbers:
        return {}
    engine = runtime.wrap_engine(_plain_engine(store, reader, len(numbers), runtime))
    try:
        memory = _allocate(engine, placement.resident_bytes)
        slots, at = [], 0
        for number in numbers:
            slots.append(memory[at : at + store.records[number].num_bytes])
            at += store.records[number].num_bytes
        link = HostLink(store, engine, slots, timeout_s=plan.read_timeout_s)
        units = {store.by_name[unit].record: unit for unit in placement.resident}
        _read_all(link, [units[number] for number in numbers])
        return {
            unit: link.tensors(unit, numbers.index(store.by_name[unit].record))
            for unit in placement.resident
        }
    finally:
        engine.close()


def _read_all(link: HostLink, units: Sequence[str]) -> None:
    """Fill slot i with unit i; two reads are under way at a time."""
    for slot, unit in enumerate(units):
        link.submit(unit, slot)
        if slot:
            link.wait(units[slot - 1], slot - 1)
    link.wait(units[-1], len(units) - 1)


def _plain_engine(store: Store, reader: str, num_slots: int, runtime: Runtime) -> ReadEngine:
    """A reader whose memory outlives it, as that of `aio` does not."""
    engines = openers(store.path, runtime.cache_dir)
    if reader != "buffered":
        try:
            return engines["direct"](num_slots)
        except ReaderUnavailableError:
            pass
    return engines["buffered"](num_slots)


def _allocate(engine: ReadEngine, num_bytes: int) -> torch.Tensor:
    try:
        return engine.allocate(num_bytes)
    except (ReaderUnavailableError, OSError) as error:
        raise ConfigError(
            f"{size_text(num_bytes)} of memory for weights cannot be had: {error}.",
            "Lower device_memory or ring_slots, or raise the limit of locked memory.",
            param="device_memory",
        ) from error


def _check(plan: OffloadPlan, request: WeightsRequest) -> None:
    if plan.verify not in VERIFY:
        raise ConfigError(
            f"verify {plan.verify!r} is not known.", f"Use {' or '.join(VERIFY)}.", param="verify"
        )
    adapted = isinstance(request.model.kernels, QuantKernels)
    if adapted != (kernel_adapter(plan) is not None):
        raise InternalError(f"The model's kernels do not know {plan.precision} weights.")
    if request.device.type != "cpu":
        raise ConfigError(f"Weights cannot be streamed to {request.device.type}.", param="device")


def _log_placement(placement: Placement, reader: str) -> None:
    _log.info(
        "weights: %d units resident (%s), %d streamed by %s through %d slots of %s, "
        "%d experts through %d slots",
        len(placement.resident),
        size_text(placement.resident_bytes),
        len(placement.ring),
        reader,
        placement.ring_slots,
        size_text(placement.ring_slot_bytes),
        len(placement.experts),
        placement.expert_slots,
    )
