"""Damaged checkpoints are refused with file, tensor, expected and found."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.base.errors import CorruptWeightsError
from replicas.models.checkpoint import load_weights
from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units
from tests.support.tiny_models import write_checkpoint

QUERY = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A llama checkpoint that a test may damage."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "copy"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint("llama", tmp_path / "sharded", max_shard_size="100KB")


def _refusal(path: Path) -> str:
    arch = arch_from_hf(json.loads((path / "config.json").read_text()))
    with pytest.raises(CorruptWeightsError) as caught:
        load_weights(path, weight_units(arch, 0, 1), dtype="float32", device="cpu")
    return str(caught.value)


def _edit(path: Path, change: Callable[[Tensors], object]) -> str:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return _refusal(path)


def _header(path: Path, change: Callable[[dict[str, Any]], str]) -> str:
    """Rewrite the JSON header of the file with what `change` returns."""
    file = path / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text = change(json.loads(raw[8 : 8 + length])).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return _refusal(path)


def test_missing_tensor(copy: Path) -> None:
    message = _edit(copy, lambda tensors: tensors.pop(QUERY))
    assert f"1 missing tensors: {QUERY}" in message


def test_unexpected_tensor(copy: Path) -> None:
    message = _edit(copy, lambda tensors: tensors.update(intruder=torch.ones(2)))
    assert "1 unexpected tensors: intruder" in message


def test_many_names_are_cut_short(copy: Path) -> None:
    message = _edit(copy, lambda t: t.update({f"x{i:02}": torch.ones(1) for i in range(20)}))
    assert "20 unexpected tensors: x00" in message
    assert "and 12 more" in message


def test_wrong_shape(copy: Path) -> None:
    message = _edit(copy, lambda tensors: tensors.update({QUERY: torch.ones(63, 64)}))
    assert f"tensor {QUERY} has shape [63, 64]" in message
    assert "needs [64, 64]" in message


def test_wrong_vocabulary(copy: Path) -> None:
    name = "model.embed_tokens.weight"
    message = _edit(copy, lambda tensors: tensors.update({name: torch.ones(130, 64)}))
    assert "[130, 64]" in message
    assert "[131, 64]" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_other_dtypes(copy: Path, dtype: torch.dtype) -> None:
    message = _edit(copy, lambda tensors: tensors.update({QUERY: torch.ones(64, 64).to(dtype)}))
    assert QUERY in message
    assert "expected one of F64, F32, F16, BF16" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(copy: Path, value: float) -> None:
    message = _edit(copy, lambda tensors: tensors[QUERY][3, 5].fill_(value))
    assert f"tensor {QUERY} holds NaN or infinite values" in message
    assert "model.safetensors" in message


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert str(file) in _refusal(copy)


def test_header_that_is_no_json(copy: Path) -> None:
    assert "header is damaged" in _header(copy, lambda _: "{not json")


def test_header_without_a_shape(copy: Path) -> None:
    def change(header: dict[str, Any]) -> str:
        del header[QUERY]["shape"]
        return json.dumps(header)

    assert "header is damaged" in _header(copy, change)


def test_header_that_lies_about_sizes(copy: Path) -> None:
    def change(header: dict[str, Any]) -> str:
        header[QUERY]["shape"] = [64, 128]
        return json.dumps(header)

    assert f"tensor {QUERY} of F32 [64, 128] has 16384 bytes" in _header(copy, change)


def test_tensor_that_stands_twice(copy: Path) -> None:
    def change(header: dict[str, Any]) -> str:
        return json.dumps(header)[:-1] + f", {json.dumps(QUERY)}: {json.dumps(header[QUERY])}}}"

    assert f"{QUERY} stands twice" in _header(copy, change)


def _reindex(path: Path, shard: str) -> str:
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][QUERY] = shard
    (path / INDEX).write_text(json.dumps(index))
    return _refusal(path)


@pytest.mark.parametrize("shard", ["../copy.safetensors", "/etc/passwd", "..", "a\\b", ""])
def test_index_that_leads_elsewhere(sharded: Path, shard: str) -> None:
    assert "not a plain file name" in _reindex(sharded, shard)


def test_index_that_names_the_wrong_shard(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(shard for shard in index.values() if shard != index[QUERY])
    assert f"tensor {QUERY} is not in {other}" in _reindex(sharded, other)


def test_missing_shard(sharded: Path) -> None:
    file = next(sharded.glob("*.safetensors"))
    file.unlink()
    assert f"{file}: the file is missing" in _refusal(sharded)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"metadata": {}}'])
def test_damaged_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text)
    assert f"{INDEX}: it is damaged" in _refusal(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, value = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: value}, second)
    assert f"tensor {name} is also in" in _refusal(sharded)


def test_link_to_a_foreign_file(copy: Path, tmp_path: Path) -> None:
    file = copy / "model.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "outside the checkpoint" in _refusal(copy)
