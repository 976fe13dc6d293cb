"""The packed store: one file with one rank's weights, a record for every unit, as slots want them.

    byte 0            4096                                                   index_offset
    | head block      | record 0 ... | record 1 ... |  ...                   | index (JSON) |

A record is a whole number of 4 KiB pages, so that it can be read past the page cache; its tensors
lie in the layout the kernels compute with. Units with the same tensors share a record. The index
says what lies where, with a CRC of each record and its guard words: the last eight bytes of every
`GUARD_STRIDE` and of the record. A reader spoils those words before a read and compares them
afterwards, which catches a read that ended early or failed in silence without looking at each byte.
A record may be compressed (`offload/compression.py`), or one rank's piece of a record that several
put together (`offload/pieces.py`): offsets of tensors are those in the whole image, CRC and guard
words those of what is stored.

The head block is written last and the file gets its name by rename, so a store is absent or whole.
Torch-free; reads headers only.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.base.errors import CorruptWeightsError

MAGIC = b"PENSTOCK"
VERSION = 3
_READABLE = (1, 2, 3)
"""Records of version 1 are never compressed, those of version 2 never pieces."""
PAGE_BYTES = 4096
TENSOR_ALIGN = 64
GUARD_BYTES = 8
GUARD_STRIDE = 64 * 1024
HEAD = struct.Struct("<8sIIQQI")
"""Magic, version, CRC of the index, its offset, its length, CRC of the fields before."""

_PACK_AGAIN = "Delete the file; it is packed again at the next start."


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """One tensor of a unit, inside its record."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the record; -1: it has no bytes and only tells dtype and shape."""
    num_bytes: int
    quant: str = ""
    """Name of the number format when it is not `dtype` alone that says what the bytes mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A contiguous piece of the file that is read as a whole."""

    offset: int
    num_bytes: int
    crc32: int
    guards: bytes
    """The guard words, in order."""
    compressed_from: int = 0
    """Bytes of the image that it decodes to, more than its own; 0: it is the image."""
    piece_of: int = 0
    """Bytes of the image that this is one rank's piece of (`offload/pieces.py`); 0: it is whole. A
    piece may have no bytes."""
    piece_at: int = 0
    """Where in that image the piece begins."""

    @property
    def image_bytes(self) -> int:
        """Of what it decodes to."""
        return self.compressed_from or self.num_bytes

    @property
    def used_bytes(self) -> int:
        """Of the memory that its units' tensors lie in; more than the image where it is a piece."""
        return self.piece_of or self.image_bytes

    @property
    def num_guards(self) -> int:
        """How many there are."""
        return self.num_bytes // GUARD_STRIDE + 1 if self.num_bytes else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUnit:
    """Where a weight unit lies."""

    name: str
    record: int
    tensors: tuple[PackedTensor, ...]


@dataclass(frozen=True, kw_only=True)
class Store:
    """The index of a packed store."""

    path: Path
    fingerprint: str
    """Of everything the contents depend on; see `offload.pack`."""
    model: str
    """The checkpoint it was made from, for people."""
    records: tuple[Record, ...]
    units: tuple[StoredUnit, ...]
    """In the order a forward pass acquires them."""

    @cached_property
    def by_name(self) -> Mapping[str, StoredUnit]:
        """The units by name."""
        return {unit.name: unit for unit in self.units}

    def record_of(self, unit: str) -> Record:
        """The record that holds `unit`."""
        return self.records[self.by_name[unit].record]

    @property
    def total_bytes(self) -> int:
        """Of all records."""
        return sum(record.num_bytes for record in self.records)

    @property
    def is_compressed(self) -> bool:
        """Whether a record has to be decoded."""
        return any(record.compressed_from for record in self.records)


def aligned(offset: int, align: int = PAGE_BYTES) -> int:
    """The next multiple of `align`."""
    return -(-offset // align) * align


def encode_index(store: Store) -> bytes:
    """The index as it is written."""
    index = {
        "fingerprint": store.fingerprint,
        "model": store.model,
        "records": [
            dataclasses.asdict(record) | {"guards": base64.b64encode(record.guards).decode()}
            for record in store.records
        ],
        "units": [dataclasses.asdict(unit) for unit in store.units],
    }
    return json.dumps(index, separators=(",", ":")).encode()


def encode_head(index: bytes, index_offset: int) -> bytes:
    """The head block that points at `index`."""
    fields = HEAD.pack(MAGIC, VERSION, zlib.crc32(index), index_offset, len(index), 0)
    fields = fields[:-4]
    return fields + struct.pack("<I", zlib.crc32(fields))


def read_store(path: Path) -> Store:
    """The index of the store at `path`.

    Raises:
        CorruptWeightsError: it is damaged, cut short, or of another version.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            offset, length, crc = _read_head(path, file.read(HEAD.size), size)
            file.seek(offset)
            index = file.read(length)
    except OSError as error:
        raise CorruptWeightsError(f"{path} cannot be read ({error}).") from error
    if zlib.crc32(index) != crc:
        raise CorruptWeightsError(f"{path}: its index is damaged.", _PACK_AGAIN)
    try:
        return _decode_index(path, json.loads(index), offset)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptWeightsError(f"{path}: its index is damaged ({error}).", _PACK_AGAIN) from (
            error
        )


def _read_head(path: Path, head: bytes, size: int) -> tuple[int, int, int]:
    if len(head) < HEAD.size or head[: len(MAGIC)] != MAGIC:
        raise CorruptWeightsError(f"{path} is not a packed store.", _PACK_AGAIN)
    _, version, crc, offset, length, own_crc = HEAD.unpack(head)
    if own_crc != zlib.crc32(head[:-4]):
        raise CorruptWeightsError(f"{path}: its head is damaged.", _PACK_AGAIN)
    if version not in _READABLE:
        raise CorruptWeightsError(
            f"{path} has format {version}; this version reads {VERSION}.", _PACK_AGAIN
        )
    if offset + length != size:
        raise CorruptWeightsError(
            f"{path} has {size} bytes and should have {offset + length}.", _PACK_AGAIN
        )
    return offset, length, crc


def _decode_index(path: Path, index: Mapping[str, Any], end: int) -> Store:
    records = tuple(
        Record(**(fields | {"guards": base64.b64decode(fields["guards"])}))
        for fields in index["records"]
    )
    units = tuple(
        StoredUnit(
            name=unit["name"],
            record=unit["record"],
            tensors=tuple(
                PackedTensor(**(tensor | {"shape": tuple(tensor["shape"])}))
                for tensor in unit["tensors"]
            ),
        )
        for unit in index["units"]
    )
    store = Store(
        path=path,
        fingerprint=index["fingerprint"],
        model=index["model"],
        records=records,
        units=units,
    )
    for complaint in _complaints(store, end):
        raise CorruptWeightsError(f"{path}: {complaint}.", _PACK_AGAIN)
    return store


def _complaints(store: Store, end: int) -> Iterator[str]:
    """What is impossible about an index."""
    for number, record in enumerate(store.records):
        pages = record.offset % PAGE_BYTES == 0 and record.num_bytes % PAGE_BYTES == 0
        is_empty = not record.num_bytes and not record.piece_of
        if is_empty or not pages or not PAGE_BYTES <= record.offset <= end - record.num_bytes:
            yield f"record {number} is not inside the file"
        if len(record.guards) != GUARD_BYTES * record.num_guards:
            yield f"record {number} has no guard words"
        if record.image_bytes < record.num_bytes or record.image_bytes % PAGE_BYTES:
            yield f"record {number} is longer than what it decodes to"
        if record.piece_of and record.piece_at + record.image_bytes > record.piece_of:
            yield f"record {number} is longer than what it is a piece of"
    for unit in store.units:
        if not 0 <= unit.record < len(store.records):
            yield f"unit {unit.name} has no record"
            continue
        size = store.records[unit.record].used_bytes
        for tensor in unit.tensors:
            if tensor.offset >= 0 and tensor.offset + tensor.num_bytes > size:
                yield f"tensor {tensor.name} of {unit.name} is not inside its record"
