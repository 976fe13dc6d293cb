"""Opens what a placement asks for: readers, memory of every tier, links; they close together."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError
from cluster.base.plan import OffloadPlan
from offload.awaited_units import Tensors, tensors_of
from offload.checkpoint_store import READER
from offload.device_copier import DeviceCopier
from offload.device_link import DeviceLink
from offload.gathered_link import GatheredLink
from offload.held_heads import HeldHeads
from offload.host_link import HostLink
from offload.layout import Store
from offload.link import Link
from offload.lossless_library import open_codec
from offload.placement import SlotRoom
from offload.readers.choose import OpenEngine
from offload.readers.engine import ReadEngine, ReaderUnavailableError
from offload.record_check import RecordCheck
from offload.residents import ArrivingUnits, copy_records, read_records, record_numbers
from offload.runtime import Runtime
from offload.shared_units import SharedUnits
from offload.staging import Staging
from replicas.worker.assembly import WeightSharers
from replicas.worker.device import pin_host_memory

_log = logging.getLogger(__name__)


class Opening:
    """One rank's tiers, on their way up.

    Args:
        reader: the one chosen for streaming.
        engines: all readers that there are for the store.
        opened: closes everything again, in reverse.

    Raises:
        ConfigError: the store is compressed and cannot be decoded here.
    """

    def __init__(  # noqa: PLR0913 - where tiers come together
        self,
        store: Store,
        plan: OffloadPlan,
        runtime: Runtime,
        device: torch.device,
        *,
        reader: str,
        engines: Mapping[str, OpenEngine],
        opened: ExitStack,
    ) -> None:
        self._store = store
        self._plan = plan
        self._runtime = runtime
        self._device = device
        self._reader = reader
        self._opened = opened
        self._engines = engines
        self._codec = open_codec(runtime.cache_dir / "kernels") if store.is_compressed else None

    def resident(self, units: tuple[str, ...]) -> Mapping[str, Tensors]:
        """Tensors of units that stay on the device; on the host's they may still be arriving.

        Raises:
            ConfigError: there is no memory for them.
            CorruptWeightsError, WeightStreamError: they cannot be read; see `ArrivingUnits` too.
        """
        if not units:
            return {}
        if self._plan.share_resident:
            shared = SharedUnits(self._store, units, self._plan.read_timeout_s)
            self._opened.callback(shared.close)
            return shared
        if self._device.type == "cpu":
            return self._arriving(units)
        engine = self._plain_engine(1)
        try:
            records = copy_records(
                self._store, units, engine, self._device, self._plan.read_timeout_s, self._codec
            )
        finally:
            engine.close()
        return tensors_of(self._store, units, records)

    def _arriving(self, units: tuple[str, ...]) -> ArrivingUnits:
        engine = self._plain_engine(len(record_numbers(self._store, units)))
        try:
            arriving = ArrivingUnits(
                self._store, units, engine, self._plan.read_timeout_s, self._codec
            )
        except OSError as error:
            engine.close()
            raise _no_memory(error) from error
        self._opened.callback(arriving.close)
        return arriving

    def pinned(self, units: tuple[str, ...]) -> Mapping[str, torch.Tensor]:
        """Records of units that stay in host memory, ready to be copied to the device.

        Raises:
            As `resident`.
        """
        if not units:
            return {}
        engine = self._plain_engine(len(record_numbers(self._store, units)))
        try:
            records = read_records(
                self._store, units, engine, self._plan.read_timeout_s, self._codec
            )
        except OSError as error:
            raise _no_memory(error) from error
        finally:
            engine.close()
        for memory in records.values():
            self._opened.callback(pin_host_memory(memory, self._device))
        return {unit: records[self._store.by_name[unit].record] for unit in units}

    def link(
        self,
        slots: SlotRoom,
        pinned: Mapping[str, torch.Tensor],
        heads: HeldHeads | None = None,
    ) -> Link:
        """Slots where the rank computes, and what fills them; on a CPU rank beside what is held.

        Raises:
            ConfigError: there is no memory for them.
        """
        streams = self._runtime.streams_of(self._device)
        if streams is None:
            return self._host_link(slots.num_slots, slots.slot_bytes, heads)
        staging = None
        if slots.num_staging:
            host = self._host_link(slots.num_staging, slots.slot_bytes)
            staging = Staging(host, slots.num_staging)
        memory = torch.empty(slots.device_bytes, dtype=torch.uint8, device=self._device)
        link = DeviceLink(
            self._store,
            staging,
            torch.split(memory, slots.slot_bytes),
            DeviceCopier(streams, slots.num_slots, poison=self._runtime.poison),
            pinned=pinned,
            timeout_s=self._plan.read_timeout_s,
        )
        self._opened.callback(link.close)
        return link

    def gathered(self, sizes: Sequence[int], sharers: WeightSharers) -> GatheredLink:
        """Slots of these sizes that several ranks have in common, and what fills them together.

        Raises:
            As `join_node_segment`.
        """
        segment = sharers.join(sum(sizes))
        self._opened.callback(segment.close)
        slots = torch.split(segment.memory, list(sizes))
        pieces = HostLink(
            self._store,
            self._plain_engine(len(sizes)),
            slots,
            check=RecordCheck(self._store, self._plan.verify),
            codec=self._codec,
            timeout_s=self._plan.read_timeout_s,
        )
        poison = self._runtime.poison
        link = GatheredLink(self._store, pieces, slots, segment, poison=poison)
        self._opened.callback(link.close)
        return link

    def _host_link(
        self, num_slots: int, slot_bytes: int, heads: HeldHeads | None = None
    ) -> HostLink:
        engine, memory = self._slots(num_slots, slot_bytes)
        host = HostLink(
            self._store,
            engine,
            torch.split(memory, slot_bytes),
            check=RecordCheck(self._store, self._plan.verify),
            codec=self._codec,
            heads=heads,
            timeout_s=self._plan.read_timeout_s,
            poison=self._runtime.poison,
        )
        self._opened.callback(host.close)
        # Undone before its memory goes, and after the copies out of it have ended.
        self._opened.callback(pin_host_memory(memory, self._device))
        return host

    def _slots(self, num_slots: int, slot_bytes: int) -> tuple[ReadEngine, torch.Tensor]:
        """The chosen reader and the memory that it fills; `direct` where so much of it cannot be
        locked, as an expert cache may need."""
        engine = self._runtime.wrap_engine(self._engines[self._reader](num_slots))
        self._opened.callback(engine.close)
        try:
            return engine, engine.allocate(num_slots * slot_bytes)
        except ReaderUnavailableError as error:
            if "direct" not in self._engines or self._reader == "direct":
                raise _no_memory(error, num_slots * slot_bytes) from error
            _log.info("%d slots are read by direct, not by %s: %s", num_slots, self._reader, error)
        except OSError as error:
            raise _no_memory(error, num_slots * slot_bytes) from error
        return self._plain_slots(num_slots, slot_bytes)

    def _plain_slots(self, num_slots: int, slot_bytes: int) -> tuple[ReadEngine, torch.Tensor]:
        try:
            engine = self._runtime.wrap_engine(self._engines["direct"](num_slots))
            self._opened.callback(engine.close)
            return engine, engine.allocate(num_slots * slot_bytes)
        except (ReaderUnavailableError, OSError) as error:
            raise _no_memory(error, num_slots * slot_bytes) from error

    def _plain_engine(self, num_slots: int) -> ReadEngine:
        """A reader whose memory outlives it, as that of `aio` does not."""
        if self._reader == READER:
            return self._runtime.wrap_engine(self._engines[READER](num_slots))
        engine = None
        if self._reader != "buffered":
            try:
                engine = self._engines["direct"](num_slots)
            except ReaderUnavailableError:
                engine = None
        return self._runtime.wrap_engine(engine or self._engines["buffered"](num_slots))


def _no_memory(error: Exception, num_bytes: int | None = None) -> ConfigError:
    size = "Memory" if num_bytes is None else f"{size_text(num_bytes)} of memory"
    return ConfigError(
        f"{size} for weights cannot be had: {error}.",
        "Lower device_memory or ring_slots, or raise the limit of locked memory.",
        param="device_memory",
    )
