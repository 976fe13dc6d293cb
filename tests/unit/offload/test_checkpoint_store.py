"""Without packing: records made from the checkpoint's files equal those of a packed store."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.base.env import default_cache_dir
from cluster.base.errors import ConfigError, PenstockError
from offload.checkpoint_store import CheckpointStore
from offload.pack import StoreRequest, ensure_store
from offload.packers import NativePacker
from replicas.api import GenerationRequest, SamplingParams
from replicas.kernels.select import select_kernels
from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units
from tests.support.offload_engine import offload_engine, offload_plan, unit_names
from tests.support.tiny_models import (
    TINY_NAMES,
    prompt_tokens,
    reference_greedy,
    tiny_model,
    write_checkpoint,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def requests_of() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=str(length),
            prompt_token_ids=tuple(prompt_tokens(length, seed=length)),
            params=GREEDY,
        )
        for length in (1, 5, 23)
    ]


@pytest.mark.parametrize("name", TINY_NAMES)
def test_every_family_gives_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path / name)
    engine = offload_engine(path, offload_plan(tmp_path / "disk", is_packed=False))
    model = tiny_model(name)
    wanted = [reference_greedy(model, list(r.prompt_token_ids), 8) for r in requests_of()]
    assert [c.token_ids for c in engine.generate(requests_of())] == wanted
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("name", ["llama_tied_wide", "mixtral", "gpt2"])
@pytest.mark.parametrize("rank", [0, 1])
def test_records_are_those_of_the_packed_store(name: str, rank: int, tmp_path: Path) -> None:
    path = write_checkpoint(name, tmp_path / name)
    arch = arch_from_hf(tiny_model(name).config.to_dict() | {
        "architectures": [type(tiny_model(name)).__name__]})  # fmt: skip
    kernels = select_kernels("auto", torch.float32, "cpu", default_cache_dir() / "kernels")
    request = StoreRequest(
        model_path=str(path),
        units=weight_units(arch, rank, 2),
        dtype="float32",
        packer=NativePacker(kernels, torch.float32),
        disk_path=str(tmp_path / "disk"),
        rank=rank,
        size=2,
    )
    packed, source = ensure_store(request), CheckpointStore(request)
    made = source.store
    assert made.units == packed.units
    assert [r.num_bytes for r in made.records] == [r.num_bytes for r in packed.records]
    engine = source.opener(1)
    data = packed.path.read_bytes()
    for ours, theirs in zip(made.records, packed.records, strict=True):
        buffer = torch.zeros(ours.num_bytes, dtype=torch.uint8)
        engine.submit(0, buffer, ours.offset)
        engine.wait(0, 10.0)
        assert bytes(buffer.numpy()) == data[theirs.offset : theirs.offset + theirs.num_bytes]
    engine.close()
    engine.close()


@pytest.mark.parametrize("resident", [(), ("embed", "layer.1"), "all"])
def test_every_residency_and_a_damaged_file(tmp_path: Path, resident: object) -> None:
    path = write_checkpoint("llama", tmp_path / "llama")
    names = tuple(unit_names(path)) if resident == "all" else resident
    plan = offload_plan(tmp_path, is_packed=False, resident_units=names, ring_slots=2)
    engine = offload_engine(path, plan)
    wanted = [reference_greedy(tiny_model("llama"), list(r.prompt_token_ids), 8)
              for r in requests_of()]  # fmt: skip
    assert [c.token_ids for c in engine.generate(requests_of())] == wanted
    (file,) = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PenstockError):
        offload_engine(path, plan).generate(requests_of())


def test_a_file_cut_short_while_it_is_served_from_is_an_error(tmp_path: Path) -> None:
    path = write_checkpoint("llama", tmp_path / "llama")
    engine = offload_engine(path, offload_plan(tmp_path, is_packed=False, ring_slots=2))
    engine.generate(requests_of())
    (file,) = path.glob("*.safetensors")
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 3)
    with pytest.raises(PenstockError, match="cannot be read"):
        engine.generate(requests_of())


@pytest.mark.parametrize("changes", [{"precision": "int8"}, {"share_resident": True}])
def test_what_needs_packing_is_refused(tmp_path: Path, changes: dict) -> None:
    path = write_checkpoint("llama", tmp_path / "llama")
    with pytest.raises(ConfigError, match="neither shared nor quantised"):
        offload_engine(path, offload_plan(tmp_path, is_packed=False, **changes))
