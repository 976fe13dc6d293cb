"""What compression will leave of a checkpoint's weights, from a sample of them. Torch-free.

The size of a compressed block follows from how often each exponent stands in it
(`offload/lossless/block.h`), so a few blocks' counts tell that of all without packing anything.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from replicas.models.checkpoint_files import StoredTensor, read_header

USUAL_SHARE = 0.68
"""Of weights that cannot be looked at: of trained and of random ones 0.67 to 0.69."""
_BLOCK = 16384
_ENTRY_BYTES = 32
_LINE_BYTES = 64
_SAMPLES = 32
_LEVELS = 3
_PER_LEVEL = 3
_STEP = {"BF16": 1, "F32": 2}
"""16-bit words of a value; its upper half is the bf16 number, but for the rounding."""


def sampled_share(directory: Path, files: Sequence[str]) -> float:
    """Bytes that lossless records take of those of their images, at most 1.

    `USUAL_SHARE` where there are too few weights, or in a format with other exponents than bf16.

    Args:
        files: the safetensors files in `directory`.

    Raises:
        CorruptWeightsError: a file is damaged.
    """
    counts = [
        Counter(_exponents(path, at, step))
        for path in (directory / name for name in files)
        for step in [_words(read_header(path))]
        if step
        for at in _places(path, step, max(1, _SAMPLES // len(files)))
    ]
    image_bytes = sum(2 * count.total() for count in counts)
    if image_bytes < 2 * _BLOCK:
        return USUAL_SHARE
    return min(1.0, sum(_block_bytes(count) for count in counts) / image_bytes)


def _words(tensors: Sequence[StoredTensor]) -> int:
    """16-bit words of a value where all large tensors are of one known format, else 0."""
    kinds = {tensor.dtype for tensor in tensors if len(tensor.shape) > 1}
    return _STEP.get(kinds.pop(), 0) if len(kinds) == 1 else 0


def _places(path: Path, step: int, count: int) -> list[int]:
    """Where blocks of a sample begin, spread over the file's data."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    room = path.stat().st_size - start - 2 * step * _BLOCK
    if room < 0:
        return [start]
    return [start + room * index // count // 4 * 4 for index in range(count)]


def _exponents(path: Path, at: int, step: int) -> list[int]:
    """Of a block's values."""
    with path.open("rb") as file:
        file.seek(at)
        data = file.read(2 * step * _BLOCK)
    whole = len(data) // (2 * step) * 2 * step
    words = memoryview(data)[:whole].cast("H").tolist()[step - 1 :: step]
    if sys.byteorder == "big":
        words = [word >> 8 | (word & 0xFF) << 8 for word in words]
    return [word >> 7 & 0xFF for word in words]


def _block_bytes(exponents: Counter[int]) -> int:
    """Of one compressed block, or of its image where that is less."""
    count = exponents.total()
    ranked = sorted(exponents.values(), reverse=True)
    size, reach = 0, count
    for level in range(_LEVELS):
        size += -(-2 * reach // 8)
        reach -= sum(ranked[_PER_LEVEL * level : _PER_LEVEL * (level + 1)])
    size = -(-(size + reach) // _LINE_BYTES) * _LINE_BYTES + count
    return min(size, 2 * count) + _ENTRY_BYTES
