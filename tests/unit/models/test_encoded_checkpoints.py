"""Published MXFP4 and FP8 checkpoints load as what transformers makes of them, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from cluster.base.errors import CorruptWeightsError
from replicas.layers.weights import WeightUnit
from replicas.models.arch import ArchConfig
from replicas.models.checkpoint import load_unit, load_weights
from replicas.models.hf_config import arch_from_hf
from replicas.models.memory import weight_bytes_per_rank
from replicas.models.weight_units import weight_units
from tests.support.encoded_checkpoints import EncodedCheckpoint, write_fp8, write_mxfp4
from tests.support.stepping import Stepper
from tests.support.tiny_models import prompt_tokens, reference_greedy, reference_logits

FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def _compressed(strategy: str, **weights: Any) -> dict[str, Any]:
    arguments = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    group = {"targets": ["Linear"], "weights": arguments | weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


CASES: dict[str, Callable[[Path], EncodedCheckpoint]] = {
    "gpt_oss_mxfp4": write_mxfp4,
    "deepseek_v3_blocks": lambda root: write_fp8(
        root,
        "deepseek_v3",
        FP8 | {"weight_block_size": [4, 4]},
        block=(4, 4),
        suffix="_scale_inv",
    ),
    "deepseek_v3_cut_blocks": lambda root: write_fp8(
        root,
        "deepseek_v3",
        FP8 | {"weight_block_size": [24, 28]},
        block=(24, 28),
        suffix="_scale_inv",
    ),
    "qwen3_moe_tensor": lambda root: write_fp8(
        root, "qwen3_moe", FP8, block=(0, 0), suffix="_scale_inv"
    ),
    "qwen3_moe_channel": lambda root: write_fp8(
        root,
        "qwen3_moe",
        _compressed("channel"),
        block=None,
        suffix="_scale",
        scale_dtype=torch.bfloat16,
    ),
    "llama_tensor": lambda root: write_fp8(
        root, "llama", _compressed("tensor"), block=(0, 0), suffix="_scale"
    ),
    "llama_blocks": lambda root: write_fp8(
        root,
        "llama",
        _compressed("block", block_structure=[16, 16]),
        block=(16, 16),
        suffix="_scale",
    ),
}
each_case = pytest.mark.parametrize("name", CASES)
Encoded = Callable[[str], EncodedCheckpoint]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    """A case's checkpoint, by name."""
    made: dict[str, EncodedCheckpoint] = {}

    def get(name: str) -> EncodedCheckpoint:
        if name not in made:
            made[name] = CASES[name](tmp_path_factory.mktemp(name))
        return made[name]

    return get


def _arch(path: Path) -> ArchConfig:
    return arch_from_hf(json.loads((path / "config.json").read_text()))


def _assert_equal(pair: EncodedCheckpoint, units: tuple[WeightUnit, ...], dtype: str) -> None:
    ours, theirs = (
        load_weights(path, units, dtype=dtype, device="cpu") for path in (pair.path, pair.plain)
    )
    for unit in units:
        got, expected = ours.acquire(unit.name), theirs.acquire(unit.name)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():
            assert got[name].dtype == tensor.dtype
            assert torch.equal(got[name], tensor), (unit.name, name)


@each_case
@pytest.mark.parametrize(("tp_size", "dtype"), [(1, "float32"), (1, "bfloat16"), (2, "bfloat16")])
def test_a_ranks_slices_are_those_of_the_dequantised_checkpoint(
    encoded: Encoded, name: str, tp_size: int, dtype: str
) -> None:
    pair = encoded(name)
    for rank in range(tp_size):
        _assert_equal(pair, weight_units(_arch(pair.path), rank, tp_size), dtype)


@pytest.mark.parametrize("name", ["gpt_oss_mxfp4", "deepseek_v3_cut_blocks", "qwen3_moe_channel"])
def test_an_expert_parallel_rank_reads_its_experts_whole(encoded: Encoded, name: str) -> None:
    pair = encoded(name)
    arch = _arch(pair.path)
    held = [[1, 4] if layer.moe else [] for layer in arch.layers]
    units = weight_units(arch, 0, 1, held)
    _assert_equal(pair, units, "bfloat16")
    expert = next(unit for unit in units if ".expert." in unit.name)
    later = load_unit(pair.path, expert, dtype="bfloat16")
    expected = load_unit(pair.plain, expert, dtype="bfloat16")
    assert all(torch.equal(later[key], expected[key]) for key in expected)


@each_case
def test_logits_and_tokens_are_those_of_transformers(encoded: Encoded, name: str) -> None:
    pair = encoded(name)
    model = AutoModelForCausalLM.from_pretrained(
        pair.plain, dtype=torch.float32, attn_implementation="eager"
    )
    _assert_answers_equal(pair.path, model.eval())


def test_transformers_loads_the_mxfp4_checkpoint_itself_to_the_same_model(encoded: Encoded) -> None:
    path = encoded("gpt_oss_mxfp4").path
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    _assert_answers_equal(path, model.eval())


def _assert_answers_equal(path: Path, model: Any) -> None:
    prompt = prompt_tokens(19)
    logits = Stepper.load(path).step({"a": prompt})["a"]
    torch.testing.assert_close(logits, reference_logits(model, prompt), atol=1e-4, rtol=1e-4)
    greedy = reference_greedy(model, prompt, 28)
    assert len(set(greedy)) > 1
    assert Stepper.load(path).greedy(prompt, 28) == greedy


@each_case
def test_planned_bytes_are_those_of_decoded_weights(encoded: Encoded, name: str) -> None:
    pair = encoded(name)
    arch = _arch(pair.path)
    assert weight_bytes_per_rank(arch, 2, "bfloat16") == weight_bytes_per_rank(
        _arch(pair.plain), 2, "bfloat16"
    )
    units = weight_units(arch, 1, 2)
    weights = load_weights(pair.path, units, dtype="bfloat16", device="cpu")
    tensors = {t.data_ptr(): t for unit in units for t in weights.acquire(unit.name).values()}
    loaded = sum(tensor.nbytes for tensor in tensors.values())
    assert loaded == weight_bytes_per_rank(arch, 2, "bfloat16")


def test_an_unstated_dtype_is_that_of_the_plain_weights(encoded: Encoded) -> None:
    config = json.loads((encoded("gpt_oss_mxfp4").path / "config.json").read_text())
    del config["dtype"]
    assert arch_from_hf(config).dtype == "bfloat16"


def _damaged(pair: EncodedCheckpoint, target: Path, **changes: torch.Tensor | None) -> Path:
    """A copy; tensors whose names end so are replaced or, with None, left out."""
    tensors = load_file(pair.path / "model.safetensors")
    for ending, value in changes.items():
        name = next(key for key in sorted(tensors) if key.endswith(ending))
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    target.mkdir()
    (target / "config.json").write_text((pair.path / "config.json").read_text())
    save_file(tensors, target / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("name", "ending", "value", "text"),
    [
        ("gpt_oss_mxfp4", "down_proj_scales", None, r"down_proj_blocks is quantised and its scal"),
        ("gpt_oss_mxfp4", "down_proj_blocks", None, r"missing tensors: .*down_proj; .*unexpected"),
        (
            "gpt_oss_mxfp4",
            "down_proj_scales",
            torch.full((6, 64, 3), 255, dtype=torch.uint8),
            r"down_proj holds NaN",
        ),
        (
            "gpt_oss_mxfp4",
            "down_proj_scales",
            torch.zeros((6, 64, 4), dtype=torch.uint8),
            r"\[6, 64, 3, 16\] and its scales .* of \[6, 64, 4\] do not belong together",
        ),
        ("deepseek_v3_blocks", "_scale_inv", None, r"is quantised and its scales \(_scale_inv"),
        ("deepseek_v3_blocks", "_scale_inv", torch.ones(3, 3), r"do not belong together"),
        ("deepseek_v3_blocks", "_scale_inv", torch.ones(3, 3).double(), r"is F64; expected F32"),
        ("qwen3_moe_channel", "_scale", torch.ones(7, 1), r"do not belong together"),
    ],
)
def test_damaged_parts_are_named(
    encoded: Encoded,
    tmp_path: Path,
    name: str,
    ending: str,
    value: torch.Tensor | None,
    text: str,
) -> None:
    path = _damaged(encoded(name), tmp_path / "damaged", **{ending: value})
    units = weight_units(_arch(path), 0, 1)
    with pytest.raises(CorruptWeightsError, match=text):
        load_weights(path, units, dtype="bfloat16", device="cpu")


def test_codes_without_a_word_in_the_configuration_are_refused(
    encoded: Encoded, tmp_path: Path
) -> None:
    pair = encoded("llama_tensor")
    path = _damaged(pair, tmp_path / "unsaid")
    (path / "config.json").write_text((pair.plain / "config.json").read_text())
    units = weight_units(_arch(path), 0, 1)
    with pytest.raises(CorruptWeightsError, match=r"unexpected tensors: .*_scale"):
        load_weights(path, units, dtype="bfloat16", device="cpu")


def test_scales_of_activations_are_left_alone(encoded: Encoded, tmp_path: Path) -> None:
    pair = encoded("llama_tensor")
    key = "model.layers.0.mlp.up_proj.input_scale"
    tensors = load_file(pair.path / "model.safetensors") | {key: torch.ones(1)}
    path = _damaged(pair, tmp_path / "static")
    save_file(tensors, path / "model.safetensors")
    _assert_equal(
        EncodedCheckpoint(path=path, plain=pair.plain),
        weight_units(_arch(path), 0, 1),
        "bfloat16",
    )
