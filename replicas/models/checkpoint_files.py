"""What a safetensors checkpoint directory holds: which file has which tensor, of what shape.

Torch-free; reads headers only. Opens nothing but safetensors files, never one outside the
directory (except the blobs a Hugging Face cache snapshot links to), and runs no code from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.errors import ConfigError, CorruptWeightsError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "U16": 2, "U32": 4, "U64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint, by its file's header."""

    name: str
    file: Path
    dtype: str
    """safetensors' own name: F32, BF16, ..."""
    shape: tuple[int, ...]


def read_index(directory: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint by name.

    A single `model.safetensors` wins over a sharded index, as in transformers.

    Raises:
        ConfigError: no such directory, or no safetensors file in it.
        CorruptWeightsError: a damaged file or index, a shard that is missing or lies outside the
            directory, or a tensor that is stored twice or not where the index says.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ConfigError(f"There is no checkpoint directory {root}.", "Check the model path.")
    if (root / SINGLE_FILE).exists():
        return _collect([_inside(root, SINGLE_FILE)])
    if (root / INDEX_FILE).exists():
        return _sharded(root)
    if any(root.glob("*.bin")) or any(root.glob("*.pt")):
        raise ConfigError(
            f"{root} has only pickled weights (.bin or .pt).",
            "Only safetensors are read; convert the checkpoint first.",
        )
    raise ConfigError(
        f"{root} holds neither {SINGLE_FILE} nor {INDEX_FILE}.", "Check the model path."
    )


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one file, checked against its size.

    Raises:
        CorruptWeightsError: truncated, not safetensors, or a name that stands twice.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise CorruptWeightsError(
                f"{file}: it is truncated or no safetensors file ({size} bytes).", _FETCH_AGAIN
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(file, pairs))
        entries = [(name, value) for name, value in header.items() if name != "__metadata__"]
        return [_entry(file, name, value, size - 8 - length) for name, value in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptWeightsError(f"{file}: its header is damaged ({error}).", _FETCH_AGAIN) from (
            error
        )


_FETCH_AGAIN = "Fetch or copy the file again."


def _entry(file: Path, name: str, value: Mapping[str, Any], data_bytes: int) -> StoredTensor:
    shape = tuple(int(extent) for extent in value["shape"])
    begin, end = value["data_offsets"]
    dtype = str(value["dtype"])
    if not 0 <= begin <= end <= data_bytes:
        raise CorruptWeightsError(
            f"{file}: tensor {name} ends at byte {end} of the data; the file has {data_bytes}.",
            _FETCH_AGAIN,
        )
    if dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise CorruptWeightsError(
            f"{file}: tensor {name} of {dtype} {list(shape)} has {end - begin} bytes.", _FETCH_AGAIN
        )
    return StoredTensor(name=name, file=file, dtype=dtype, shape=shape)


def _sharded(root: Path) -> dict[str, StoredTensor]:
    index_file = _inside(root, INDEX_FILE)
    try:
        listed = json.loads(index_file.read_bytes())["weight_map"]
        places = {str(name): str(shard) for name, shard in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptWeightsError(f"{index_file}: it is damaged ({error}).", _FETCH_AGAIN) from (
            error
        )
    found = _collect(_inside(root, shard) for shard in dict.fromkeys(places.values()))
    for name, shard in places.items():
        if name not in found or found[name].file.name != Path(_inside(root, shard)).name:
            raise CorruptWeightsError(
                f"{index_file}: tensor {name} is not in {shard}, where the index puts it.",
                _FETCH_AGAIN,
            )
    return found


def _collect(files: Iterable[Path]) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in read_header(file):
            if tensor.name in found:
                raise CorruptWeightsError(
                    f"{file}: tensor {tensor.name} is also in {found[tensor.name].file}."
                )
            found[tensor.name] = tensor
    return found


def _inside(root: Path, name: str) -> Path:
    """The real path of a file of the checkpoint; refuses names and links that lead elsewhere."""
    if Path(name).name != name or "\\" in name or name in ("", ".", ".."):
        raise CorruptWeightsError(
            f"{root / INDEX_FILE}: shard {name!r} is not a plain file name.",
            "A checkpoint may only name files in its own directory.",
        )
    file = root / name
    if not file.is_file():
        raise CorruptWeightsError(f"{file}: the file is missing.", _FETCH_AGAIN)
    home, real = root.resolve(), file.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # Hugging Face cache: files link to ../../blobs
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CorruptWeightsError(
            f"{file}: it is a link to {real}, outside the checkpoint.",
            "Copy the file into the directory.",
        )
    return file


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CorruptWeightsError(f"{file}: {', '.join(twice)} stands twice in its header.")
    return values
