"""A model twice as large as the memory its process may have is served, without a single reclaim."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from replicas.models.hf_config import arch_from_hf
from replicas.models.weight_units import weight_units
from tests.support.capped_replica import requests
from tests.support.in_process_engine import in_process_engine
from tests.support.memory_cgroup import MemoryCgroup
from tests.support.offload_engine import offload_engine, offload_plan

MIB = 2**20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 30,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def write_model(path: Path) -> int:
    """A random checkpoint; returns its bytes in fp32."""
    generator = torch.Generator().manual_seed(0)
    # Noise is slow to make: all matrices are windows of one pool.
    pool = (0.03 * torch.randn(2**22, generator=generator)).bfloat16()
    tensors: dict[str, torch.Tensor] = {}
    for unit in weight_units(arch_from_hf(CONFIG), 0, 1):
        for spec in unit.tensors:
            for source, shape in zip(spec.sources, spec.full_shapes, strict=True):
                count = torch.Size(shape).numel()
                start = (7919 * len(tensors)) % (pool.numel() - count + 1)
                noise = pool[start : start + count].view(shape)
                tensors[source.name] = (noise + 1 if len(shape) == 1 else noise).clone()
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return 4 * sum(tensor.numel() for tensor in tensors.values())


def test_a_model_twice_its_limit_is_served_without_reclaim(tmp_path: Path) -> None:
    model, disk = tmp_path / "model", tmp_path / "disk"
    model_bytes = write_model(model)
    limit_bytes = model_bytes // 2
    try:
        group = MemoryCgroup.create(f"penstock-test-{os.getpid()}", limit_bytes)
    except OSError as error:
        pytest.skip(f"a memory cgroup cannot be made here: {error}")
    try:
        offload_engine(model, offload_plan(disk))  # packs
        command = [sys.executable, "-m", "tests.support.capped_replica", str(model), str(disk)]
        done = group.run([*command, str(limit_bytes // 2)], timeout_s=120.0)
        assert done.returncode == 0, done.stderr
        assert group.times_at_limit == 0
        assert group.peak_bytes < limit_bytes
    finally:
        group.close()
    expected = [c.token_ids for c in in_process_engine(model).generate(requests())]
    assert json.loads(done.stdout) == expected
