"""What a checkpoint directory says about itself: configuration, files, bytes; never tensor data.

Reads JSON files and the headers of safetensors files, all with bounds. A directory that cannot be
served (no tokenizer.json, no safetensors, a missing or cut shard) is refused here, minutes before
a worker would find out.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.base.errors import ConfigError
from cluster.base.problems import shown

MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 100 * 10**6
"""The safetensors library's own bound."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_CODE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint that has all its files."""

    directory: Path
    config: Mapping[str, Any]
    """config.json."""
    generation_config: Mapping[str, Any]
    """generation_config.json; empty when there is none."""
    files: tuple[str, ...]
    """The safetensors files, in order of names."""
    num_tensors: int
    weight_bytes: int
    """Bytes of all tensors as stored."""

    def eos_token_ids(self, fallback: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens that end a text: generation_config.json wins over config.json.

        Raises:
            ConfigError: `eos_token_id` is neither a token id nor a list of them.
        """
        value = self.generation_config.get("eos_token_id")
        if value is None:
            return fallback
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise _broken(
                self.directory / "generation_config.json", f"eos_token_id is {shown(value)}"
            )
        return tuple(dict.fromkeys(ids))


def read_checkpoint(directory: Path) -> CheckpointInfo:
    """Look at a checkpoint directory.

    Raises:
        ConfigError: it lacks a file, or one is damaged.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ConfigError(
            f"{directory} is not a checkpoint: it has no config.json.",
            "Give a directory as `hf download` or `save_pretrained` writes it.",
        )
    config = read_json_object(config_file)
    files = _weight_files(directory)
    headers = [read_safetensors_header(directory / name) for name in files]
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(
            f"{directory} has no tokenizer.json.",
            "Only fast tokenizers are served; convert it on any machine with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        )
    generation_file = directory / "generation_config.json"
    return CheckpointInfo(
        directory=directory,
        config=config,
        generation_config=read_json_object(generation_file) if generation_file.is_file() else {},
        files=files,
        num_tensors=sum(len(header) for header in headers),
        weight_bytes=sum(size for header in headers for size in header.values()),
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object.

    Raises:
        ConfigError: it cannot be read, is too large, or is not a JSON object.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise _broken(path, error.strerror or "cannot be read") from None
    if len(data) > MAX_JSON_BYTES:
        raise _broken(path, f"larger than {MAX_JSON_BYTES >> 20} MiB")
    return _json_object(path, data)


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise _broken(path, "not valid JSON") from None
    if not isinstance(value, dict):
        raise _broken(path, "not a JSON object")
    return value


def _weight_files(directory: Path) -> tuple[str, ...]:
    index_file = directory / INDEX_FILE
    if index_file.is_file():
        weight_map = read_json_object(index_file).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise _broken(index_file, "no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        if odd := next((name for name in names if Path(name).name != name), None):
            raise _broken(index_file, f"{shown(odd)} is not a plain file name")
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise ConfigError(
                f"{directory} lacks {len(missing)} of {len(names)} weight files, "
                f"first {shown(missing[0])}.",
                "Finish the download.",
            )
        return tuple(names)
    if (directory / SINGLE_FILE).is_file():
        return (SINGLE_FILE,)
    others = [path.name for path in sorted(directory.glob("*.bin"))]
    found = f" It has {others[0]}, which is pickled and never read." if others else ""
    raise ConfigError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}.{found}",
        "Convert the weights to safetensors: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(DIR).",
    )


def read_safetensors_header(path: Path) -> dict[str, int]:
    """Stored bytes of every tensor in a safetensors file, by name.

    The format: 8 bytes little-endian header length, the JSON header, then the data, whose end
    the header's largest offset must reach exactly.

    Raises:
        ConfigError: the header is malformed or the file is cut.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise _broken(path, "no safetensors header")
            header = _json_object(path, stream.read(length))
    except OSError as error:
        raise _broken(path, error.strerror or "cannot be read") from None
    header.pop("__metadata__", None)
    end = 0
    sizes: dict[str, int] = {}
    for name, entry in header.items():
        start, stop = _tensor_span(path, name, entry)
        sizes[name] = stop - start
        end = max(end, stop)
    if 8 + length + end != size:
        wanted, word = 8 + length + end, "cut" if 8 + length + end > size else "too long"
        raise _broken(path, f"{word}: {size} bytes where its header needs {wanted}")
    return sizes


def _tensor_span(path: Path, name: str, entry: object) -> tuple[int, int]:
    """Start and stop of a tensor's bytes, checked against its dtype and shape."""
    match entry:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [int(start), int(stop)],
        } if all(type(n) is int and n >= 0 for n in shape) and 0 <= start <= stop:
            item = _CODE_BYTES.get(dtype)
            if item is not None and item * math.prod(shape) != stop - start:
                raise _broken(path, f"the size of tensor {shown(name)} does not match its shape")
            return start, stop
    raise _broken(path, f"tensor {shown(name)} has no dtype, shape and offsets")


def _broken(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} is damaged: {why}.", "Fetch or export the checkpoint again.")
