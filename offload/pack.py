"""Checkpoint -> packed store, one tensor in memory at a time; one record where it is compressed.

Linear weights are laid out for the kernels that will compute with them, so a streamed unit costs
no work when it arrives. The name of a store is the fingerprint of all that its bytes depend on:
another checkpoint, dtype, slice or kernel layout is another store, and an old one is never taken
for a new one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.base.amount_text import size_text
from cluster.base.errors import ConfigError, CorruptWeightsError
from offload.compression import RecordCodec
from offload.layout import PackedTensor, Store, StoredUnit, read_store
from offload.packers import Packer, bytes_of
from offload.pieces import Piece, piece_bytes
from offload.placement import is_routed
from offload.record_sizes import record_bytes
from offload.store_lock import alone
from offload.store_writer import TEMPORARY_SUFFIX, StoreWriter
from replicas.layers.weights import TensorSpec, WeightUnit
from replicas.models.checkpoint import ProgressCallback, open_checkpoint
from replicas.models.checkpoint_files import read_index


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreRequest:
    """What a store is made of: one rank's units of one checkpoint, for one set of kernels."""

    model_path: str
    units: tuple[WeightUnit, ...]
    dtype: str
    packer: Packer
    disk_path: str
    rank: int = 0
    size: int = 1
    codec: RecordCodec | None = None
    """Makes records smaller; None: they are stored as they are used."""
    piece: Piece | None = None
    """Of all records but routed experts' only this piece is stored; None: they are whole."""

    def fingerprint(self) -> str:
        """Of everything the store's bytes depend on.

        Contents of the checkpoint are told by name, size and time of each file: reading them all
        would take as long as packing.

        Raises:
            ConfigError, CorruptWeightsError: the checkpoint's files cannot be read.
        """
        digest = hashlib.sha256()
        files = sorted({tensor.file for tensor in read_index(self.model_path).values()})
        for file in files:
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        config = Path(self.model_path) / "config.json"
        digest.update(config.read_bytes() if config.exists() else b"")
        digest.update(f"{self.dtype} {self.packer.layout} {self.rank}/{self.size}".encode())
        digest.update(repr(self.units).encode())
        digest.update(b"" if self.codec is None else self.codec.name.encode())
        digest.update(b"" if self.piece is None else repr(self.piece).encode())
        return digest.hexdigest()

    def target(self, fingerprint: str) -> Path:
        """Where the store lies."""
        name = f"{fingerprint[:24]}-{self.rank + 1}of{self.size}.weights"
        return Path(self.disk_path) / name


def ensure_store(request: StoreRequest, on_progress: ProgressCallback | None = None) -> Store:
    """The store of `request`: what is there, or packed now.

    Args:
        on_progress: told (bytes packed, bytes in all, an upper bound).

    Raises:
        ConfigError: no place on the disk, or it cannot be written.
        CorruptWeightsError: the checkpoint is damaged.
    """
    fingerprint = request.fingerprint()
    target = request.target(fingerprint)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if store := _whole(target, fingerprint):
            return store
        with alone(target.with_suffix(".lock")):
            if store := _whole(target, fingerprint):
                return store
            _remove_leftovers(target)
            pack_store(request, target, fingerprint, on_progress)
    except OSError as error:
        raise ConfigError(
            f"The packed weights cannot be written to {request.disk_path} ({error}).",
            "Choose a directory with enough space that this user may write.",
            param="disk_path",
        ) from error
    return read_store(target)


def pack_store(
    request: StoreRequest,
    target: Path,
    fingerprint: str,
    on_progress: ProgressCallback | None = None,
) -> None:
    """Write the store to `target`; nothing is there before all is.

    Raises:
        ConfigError: the disk has no room for it.
        CorruptWeightsError: the checkpoint is damaged.
        OSError: the disk failed.
    """
    total = sum(record_bytes(unit, request.dtype) for unit in request.units)
    _check_space(target, sum(_stored_bytes(unit, request) for unit in request.units))
    reading = open_checkpoint(request.model_path, request.units, dtype=request.dtype)
    with reading as load, StoreWriter(target, request.codec) as writer:
        packing = _Packing(writer, load, request)
        units = []
        for unit in request.units:
            units.append(packing.add(unit))
            if on_progress is not None:
                done = sum(record.used_bytes for record in writer.records)
                on_progress(min(done, total), total)
        writer.commit(
            Store(
                path=target,
                fingerprint=fingerprint,
                model=request.model_path,
                records=writer.records,
                units=tuple(units),
            )
        )


class _Packing:
    """Units of one store so far: which tensors already lie in which record."""

    def __init__(
        self,
        writer: StoreWriter,
        load: Callable[[TensorSpec], torch.Tensor],
        request: StoreRequest,
    ) -> None:
        self._writer = writer
        self._load = load
        self._packer = request.packer
        self._piece = request.piece
        specs = [spec for unit in request.units for spec in unit.tensors]
        # A table that is also the head lies as the head wants it.
        self._linear = {_identity(spec) for spec in specs if spec.is_linear}
        self._done: list[tuple[int, dict[TensorSpec, list[PackedTensor]]]] = []

    def add(self, unit: WeightUnit) -> StoredUnit:
        """Write the unit's record, unless another one holds all of its tensors."""
        for record, packed in self._done:
            if unit.tensors and all(_identity(spec) in packed for spec in unit.tensors):
                return _stored(unit, record, packed)
        self._writer.begin(None if is_routed(unit.name) else self._piece)
        packed = {}
        for spec in unit.tensors:
            packed[_identity(spec)] = list(self._write(unit.name, spec))
        record = self._writer.finish()
        self._done.append((record, packed))
        return _stored(unit, record, packed)

    def _write(self, unit: str, spec: TensorSpec) -> Iterator[PackedTensor]:
        local = self._load(spec)
        laid_out: Mapping[str, torch.Tensor] = {"": local}
        if _identity(spec) in self._linear:
            laid_out = self._packer.pack(unit, spec.name, local)
        for suffix, tensor in laid_out.items():
            yield PackedTensor(
                name=suffix,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=-1 if tensor.is_meta else self._writer.add(bytes_of(tensor)),
                num_bytes=0 if tensor.is_meta else tensor.nbytes,
            )


def _stored(
    unit: WeightUnit, record: int, packed: Mapping[TensorSpec, list[PackedTensor]]
) -> StoredUnit:
    tensors = tuple(
        dataclasses.replace(tensor, name=spec.name + tensor.name)
        for spec in unit.tensors
        for tensor in packed[_identity(spec)]
    )
    return StoredUnit(name=unit.name, record=record, tensors=tensors)


def _identity(spec: TensorSpec) -> TensorSpec:
    """Equal for specs that ask for the same bytes."""
    return dataclasses.replace(spec, name="")


def _whole(target: Path, fingerprint: str) -> Store | None:
    """The store at `target` if it can be used; a damaged one is made again."""
    if not target.exists():
        return None
    try:
        store = read_store(target)
    except CorruptWeightsError:
        return None
    return store if store.fingerprint == fingerprint else None


def _stored_bytes(unit: WeightUnit, request: StoreRequest) -> int:
    """Most bytes of a unit's record on this rank's disk."""
    whole = record_bytes(unit, request.dtype)
    if request.piece is None or is_routed(unit.name):
        return whole
    return piece_bytes(whole, request.piece.count)


def _check_space(target: Path, num_bytes: int) -> None:
    status = os.statvfs(target.parent)
    free = status.f_bavail * status.f_frsize
    if free < num_bytes:
        raise ConfigError(
            f"The packed weights take {size_text(num_bytes)} and {target.parent} has "
            f"{size_text(free)} left.",
            "Choose another directory or free some space.",
            param="disk_path",
        )


def _remove_leftovers(target: Path) -> None:
    """Files of packers that died; the lock says that none is at work."""
    for part in target.parent.glob(f"{target.name}.*{TEMPORARY_SUFFIX}"):
        part.unlink(missing_ok=True)
