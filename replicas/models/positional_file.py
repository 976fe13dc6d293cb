"""Tensors of a safetensors file by positioned reads, for who serves while the file may change.

The format's own reader maps the file, and a mapped file that is cut short ends the process with
SIGBUS at the next access. A read of it comes back short, which is an error that can be told.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

import torch

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class PositionalFile:
    """The part of `safetensors.safe_open` that loading needs; a context manager.

    Raises (every method): OSError when the file is shorter than its header says.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        length = int.from_bytes(self._bytes(0, 8).numpy().tobytes(), "little")
        self._header: dict[str, Any] = json.loads(self._bytes(8, length).numpy().tobytes())
        self._data_start = 8 + length

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def get_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor; the only way to a number, which has no axes."""
        entry = self._header[name]
        start, end = entry["data_offsets"]
        flat = self._bytes(self._data_start + start, end - start)
        return flat.view(_DTYPES[entry["dtype"]]).view(entry["shape"])

    def get_slice(self, name: str) -> PositionalSlice:
        """A tensor to be cut before it is read."""
        return PositionalSlice(self, name)

    def rows(self, name: str, rows: slice) -> torch.Tensor:
        """Entries `rows` (step 1) of the first axis."""
        entry = self._header[name]
        first, *others = entry["shape"]
        start, stop, _ = rows.indices(first)
        data_start, data_end = entry["data_offsets"]
        row_bytes = (data_end - data_start) // first if first else 0
        count = max(0, stop - start)
        flat = self._bytes(self._data_start + data_start + start * row_bytes, count * row_bytes)
        return flat.view(_DTYPES[entry["dtype"]]).view([count, *others])

    def _bytes(self, offset: int, num_bytes: int) -> torch.Tensor:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        view, done = memoryview(buffer.numpy().data), 0
        while done < num_bytes:
            read = os.preadv(self._descriptor, [view[done:]], offset + done)
            if not read:
                raise OSError(f"it ends at byte {offset + done}; was it changed or cut short?")
            done += read
        return buffer


class PositionalSlice:
    """What `get_slice` gives: indexed by a tuple of slices (step 1), reads the rows they span."""

    def __init__(self, file: PositionalFile, name: str) -> None:
        self._file = file
        self._name = name

    def __getitem__(self, cuts: tuple[slice, ...]) -> torch.Tensor:
        first, *others = cuts
        return self._file.rows(self._name, first)[(slice(None), *others)]
