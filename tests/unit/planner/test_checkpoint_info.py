"""What a checkpoint directory says about itself, whole and damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from fake_checkpoints import write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cluster.base.errors import ConfigError
from cluster.planner.checkpoint_info import read_checkpoint, read_safetensors_header


def _header_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_a_whole_checkpoint(tmp_path: Path):
    info = read_checkpoint(write_checkpoint(tmp_path))
    assert info.files == ("model.safetensors",)
    assert (info.num_tensors, info.weight_bytes) == (2, 4 * 2 * 4 + 3 * 2)
    assert info.config["model_type"] == "llama"
    assert info.generation_config == {}


def test_shards_through_the_index(tmp_path: Path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for index in (1, 2):
        save_file({f"t{index}": np.zeros(8, np.float32)}, tmp_path / f"model-{index}.safetensors")
    weight_map = {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}
    index_file = tmp_path / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    assert read_checkpoint(tmp_path).weight_bytes == 64
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks 1 of 2 weight files.*model-2") as caught:
        read_checkpoint(tmp_path)
    assert "Finish the download" in caught.value.remedy
    index_file.write_text(json.dumps({"weight_map": {"t1": "../../etc/passwd"}}))
    with pytest.raises(ConfigError, match="not a plain file name"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("missing", "cause", "remedy"),
    [
        ("config.json", "no config.json", "hf download"),
        ("tokenizer.json", "no tokenizer.json", "save_pretrained"),
        ("model.safetensors", "neither model.safetensors nor", "Convert the weights"),
    ],
)
def test_a_missing_file(missing: str, cause: str, remedy: str, tmp_path: Path):
    write_checkpoint(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(ConfigError, match=cause) as caught:
        read_checkpoint(tmp_path)
    assert remedy in caught.value.remedy


def test_pickled_weights_are_named_and_not_read(tmp_path: Path):
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin, which is pickled"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"a": ' * 50_000, "\udcff"])
def test_json_that_is_not_an_object(text: str, tmp_path: Path):
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        read_checkpoint(tmp_path)


def test_header_of_a_real_file(tmp_path: Path):
    write_checkpoint(tmp_path)
    assert read_safetensors_header(tmp_path / "model.safetensors") == {
        "a.weight": 32,
        "b.weight": 6,
    }


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        ({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 7, None, "cut"),
        (
            {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
            b"\0" * 9,
            None,
            "too long",
        ),
        ({"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8, None, "shape"),
        (
            {"t": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
            b"\0" * 8,
            None,
            "no dtype",
        ),
        (
            {"t": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
            b"\0" * 8,
            None,
            "no dtype",
        ),
        ({"t": 5}, b"", None, "no dtype"),
        ({}, b"", 2**63, "no safetensors header"),
        ({}, b"", 0, "no safetensors header"),
        (b"not json", b"", None, "not valid JSON"),
        (b"[1, 2]", b"", None, "not a JSON object"),
    ],
)
def test_damaged_headers(
    header: object, data: bytes, length: int | None, words: str, tmp_path: Path
):
    path = _header_file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(ConfigError, match=words):
        read_safetensors_header(path)


@given(st.binary(max_size=64))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_weights(tmp_path: Path, data: bytes):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        read_safetensors_header(path)


@pytest.mark.parametrize(
    ("written", "expected"),
    [(7, (7,)), ([3, 4, 3], (3, 4)), (None, (9,))],
)
def test_eos_ids_of_the_generation_config_win(
    written: object, expected: tuple[int, ...], tmp_path: Path
):
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
    assert read_checkpoint(tmp_path).eos_token_ids((9,)) == expected


@pytest.mark.parametrize("written", ["</s>", [1, "a"], True, -1, 1.5])
def test_eos_ids_that_are_none(written: object, tmp_path: Path):
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
    with pytest.raises(ConfigError, match="eos_token_id"):
        read_checkpoint(tmp_path).eos_token_ids((9,))
