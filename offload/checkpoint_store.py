"""Weights straight from a checkpoint's safetensors files, as if they had been packed.

A `Store` without a file: its index says where each tensor would lie in a record, and a reader makes
the record whenever it is asked for one. Ring, residents and expert slots do not see the difference.
What it costs: each step finds the slices, lays them out for the kernels and checks them anew, and
reads through the page cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from cluster.base.errors import CorruptWeightsError, PenstockError, WeightStreamError
from offload.host_memory import block_on_demand
from offload.layout import (
    PAGE_BYTES,
    TENSOR_ALIGN,
    PackedTensor,
    Record,
    Store,
    StoredUnit,
    aligned,
)
from offload.pack import StoreRequest
from offload.readers.engine import ReadTimeoutError
from replicas.layers.weights import TensorSpec, WeightUnit
from replicas.models.checkpoint import open_checkpoint
from replicas.models.context import torch_dtype

READER = "checkpoint"
"""Name of the only reader of such a store."""


class CheckpointStore:
    """The index of a checkpoint as its packed store would have it, and the recipe of its records.

    Args:
        request: its packer must make tensors whose sizes depend on shapes alone.

    Raises:
        CorruptWeightsError, ConfigError: the checkpoint's files cannot be read.
    """

    def __init__(self, request: StoreRequest) -> None:
        self._request = request
        self._shapes: dict[object, tuple[PackedTensor, ...]] = {}
        specs = [spec for unit in request.units for spec in unit.tensors]
        # A table that is also the head lies as the head wants it.
        self._linear = {_identity(spec) for spec in specs if spec.is_linear}
        self._recipes: dict[int, WeightUnit] = {}
        records: list[Record] = []
        units: list[StoredUnit] = []
        offsets: list[dict[TensorSpec, int]] = []
        for unit in request.units:
            number = self._find(unit, offsets)
            if number is None:
                number = len(records)
                offsets.append(self._place(unit))
                start = records[-1].offset + records[-1].num_bytes if records else PAGE_BYTES
                records.append(self._record(offsets[-1], start))
                self._recipes[start] = unit
            units.append(self._stored(unit, number, offsets[number]))
        self.store = Store(
            path=Path(request.model_path),
            fingerprint=request.fingerprint(),
            model=request.model_path,
            records=tuple(records),
            units=tuple(units),
        )

    def opener(self, num_slots: int) -> CheckpointEngine:
        """A reader of so many slots."""
        return CheckpointEngine(self, self._request)

    def fill(
        self, offset: int, buffer: torch.Tensor, load: Callable[[TensorSpec], torch.Tensor]
    ) -> None:
        """Make the record that would lie at `offset`.

        Raises:
            CorruptWeightsError: the checkpoint is damaged, or has changed.
        """
        unit = self._recipes[offset]
        at = 0
        for spec in unit.tensors:
            for entry, tensor in zip(
                self._layout(spec), self._laid_out(spec, load(spec)).values(), strict=True
            ):
                if tensor.is_meta:
                    continue
                at = aligned(at, TENSOR_ALIGN)
                if tensor.nbytes != entry.num_bytes:
                    raise CorruptWeightsError(f"{unit.name}: {spec.name} has another size.")
                flat = tensor.contiguous().view(-1).view(torch.uint8)
                buffer[at : at + entry.num_bytes].copy_(flat)
                at += entry.num_bytes

    @staticmethod
    def _find(unit: WeightUnit, offsets: Sequence[Mapping[TensorSpec, int]]) -> int | None:
        """A record that has all tensors of a unit already."""
        wanted = {_identity(spec) for spec in unit.tensors}
        found = (
            number for number, record in enumerate(offsets) if wanted and wanted <= set(record)
        )
        return next(found, None)

    def _place(self, unit: WeightUnit) -> dict[TensorSpec, int]:
        """Offset of the first byte of each spec's tensors."""
        at, offsets = 0, {}
        for spec in unit.tensors:
            at = aligned(at, TENSOR_ALIGN)
            offsets[_identity(spec)] = at
            for entry in self._layout(spec):
                if entry.offset >= 0:
                    at = aligned(at, TENSOR_ALIGN) + entry.num_bytes
        return offsets

    def _record(self, offsets: Mapping[TensorSpec, int], start: int) -> Record:
        ends = [
            offset + sum(aligned(e.num_bytes, TENSOR_ALIGN) for e in self._layout(spec))
            for spec, offset in offsets.items()
        ]
        return Record(
            offset=start, num_bytes=aligned(max(ends, default=1)) or PAGE_BYTES, crc32=0, guards=b""
        )

    def _stored(
        self, unit: WeightUnit, number: int, offsets: Mapping[TensorSpec, int]
    ) -> StoredUnit:
        return StoredUnit(
            name=unit.name, record=number, tensors=tuple(self._entries(unit, offsets))
        )

    def _entries(
        self, unit: WeightUnit, offsets: Mapping[TensorSpec, int]
    ) -> Iterator[PackedTensor]:
        for spec in unit.tensors:
            at = offsets[_identity(spec)]
            for entry in self._layout(spec):
                name = spec.name + entry.name
                if entry.offset < 0:
                    yield replace(entry, name=name)
                    continue
                at = aligned(at, TENSOR_ALIGN)
                yield replace(entry, name=name, offset=at)
                at += entry.num_bytes

    def _layout(self, spec: TensorSpec) -> tuple[PackedTensor, ...]:
        """What the kernels make of a tensor of this shape; offset -1 where it has no bytes."""
        dtype = torch_dtype(spec.dtype or self._request.dtype)
        key = (spec.shape, dtype, _identity(spec) in self._linear)
        if key not in self._shapes:
            probe = torch.zeros(spec.shape, dtype=dtype)
            self._shapes[key] = tuple(
                PackedTensor(
                    name=suffix,
                    dtype=str(tensor.dtype).removeprefix("torch."),
                    shape=tuple(tensor.shape),
                    offset=-1 if tensor.is_meta else 0,
                    num_bytes=0 if tensor.is_meta else tensor.nbytes,
                )
                for suffix, tensor in self._laid_out(spec, probe).items()
            )
        return self._shapes[key]

    def _laid_out(self, spec: TensorSpec, local: torch.Tensor) -> Mapping[str, torch.Tensor]:
        if _identity(spec) in self._linear:
            return self._request.packer.pack("", spec.name, local)
        return {"": local}


class CheckpointEngine:
    """Implements `ReadEngine`: records are made by a thread, one after another.

    Raises:
        ConfigError, CorruptWeightsError: the checkpoint's files cannot be opened.
    """

    name = READER

    def __init__(self, source: CheckpointStore, request: StoreRequest) -> None:
        self._source = source
        self._files = ExitStack()
        self._load = self._files.enter_context(
            open_checkpoint(request.model_path, request.units, dtype=request.dtype, is_mapped=False)
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._making: dict[int, Future[None]] = {}

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """See `ReadEngine`."""
        return block_on_demand(num_bytes)

    def submit(self, slot: int, buffer: torch.Tensor, offset: int) -> None:
        """See `ReadEngine`."""
        self._making[slot] = self._thread.submit(self._make, offset, buffer)

    def wait(self, slot: int, timeout_s: float) -> None:
        """See `ReadEngine`."""
        try:
            self._making[slot].result(timeout_s)
        except FutureTimeoutError as error:
            raise ReadTimeoutError(f"A record is not made after {timeout_s:g} s.") from error

    def close(self) -> None:
        """See `ReadEngine`."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    @torch.inference_mode()
    def _make(self, offset: int, buffer: torch.Tensor) -> None:
        try:
            self._source.fill(offset, buffer, self._load)
        except PenstockError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise WeightStreamError(
                f"A part of {self._source.store.path} cannot be read ({error}).",
                "Look at the disk.",
            ) from error


def _identity(spec: TensorSpec) -> TensorSpec:
    """Equal for specs that ask for the same bytes."""
    return replace(spec, name="")
