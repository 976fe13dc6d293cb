"""Which quantised checkpoints are read, and how the others are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.base.errors import ConfigError
from replicas.models.hf_encoding import encoding_from_hf, read_encoding
from replicas.models.weight_encoding import Codes, WeightEncoding


def _compressed(weights: dict[str, Any], **changes: Any) -> dict[str, Any]:
    section = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "kv_cache_scheme": None,
        "sparsity_config": {"format": "dense"},
    }
    return section | changes


FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
BLOCKS = FLOAT8 | {"strategy": "block", "block_structure": [128, 128]}


@pytest.mark.parametrize(
    ("section", "encoding"),
    [
        ({"quant_method": "mxfp4"}, WeightEncoding(codes=Codes.MXFP4, title="mxfp4")),
        (
            {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
            WeightEncoding(codes=Codes.FP8, title="fp8", block=(128, 128)),
        ),
        (
            {"quant_method": "fp8", "activation_scheme": "static"},
            WeightEncoding(codes=Codes.FP8, title="fp8"),
        ),
        (_compressed(FLOAT8), WeightEncoding(codes=Codes.FP8, title="compressed-tensors")),
        (
            _compressed(BLOCKS),
            WeightEncoding(codes=Codes.FP8, title="compressed-tensors", block=(128, 128)),
        ),
    ],
)
def test_what_is_read(section: dict[str, Any], encoding: WeightEncoding) -> None:
    assert encoding_from_hf({"quantization_config": section}) == encoding
    assert encoding_from_hf({"compression_config": section}) == encoding


@pytest.mark.parametrize(
    ("section", "cause", "remedy"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantised with awq", "precision: int4"),
        ({"quant_method": "gptq", "bits": 4}, "quantised with gptq", "FP8 checkpoint"),
        ({"quant_method": "bitsandbytes"}, "with bitsandbytes", "model.dequantize()"),
        ({"quant_method": "nvfp4"}, "quantised with nvfp4", "FP8 checkpoint"),
        ({"bits": 4}, "by an unnamed method", "FP8 checkpoint"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "format e5m2", "FP8 checkpoint"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "block is [128]", "whole numbers"),
        (_compressed(FLOAT8, format="pack-quantized"), "format pack-quantized", "FP8"),
        (_compressed(FLOAT8 | {"type": "int"}), "type int, 8 bits, strategy channel", "FP8"),
        (_compressed(FLOAT8 | {"strategy": "group"}), "strategy group", "FP8"),
        (_compressed(FLOAT8, kv_cache_scheme={"num_bits": 8}), "quantised KV cache", "FP8"),
        (_compressed(FLOAT8, sparsity_config={"format": "sparse-24-bitmask"}), "is sparse", "FP8"),
        (
            _compressed(
                FLOAT8,
                config_groups={"a": {"weights": FLOAT8}, "b": {"weights": BLOCKS}},
            ),
            "2 kinds of scales",
            "FP8",
        ),
        (_compressed(FLOAT8, config_groups={}), "0 kinds of scales", "FP8"),
    ],
)
def test_what_is_refused_by_name(section: dict[str, Any], cause: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        encoding_from_hf({"quantization_config": section})
    assert cause in caught.value.cause
    assert remedy in caught.value.remedy
    assert caught.value.param == "quantization_config"


def test_a_directory_says_it_in_its_config(tmp_path: Path) -> None:
    assert read_encoding(tmp_path) is None
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "mxfp4"}})
    )
    encoding = read_encoding(tmp_path)
    assert encoding is not None
    assert encoding.codes is Codes.MXFP4
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="no JSON object"):
        read_encoding(tmp_path)
