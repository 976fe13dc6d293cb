"""PR-MoE models compute what DeepSpeed's own MoE layers compute, in place in a GPT-2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from cluster.base.errors import ConfigError
from cluster.dist.lone_group import ensure_lone_group
from replicas.models.hf_config import arch_from_hf
from tests.support.stepping import Stepper
from tests.support.tiny_models import (
    prompt_tokens,
    reference_greedy,
    reference_logits,
    tiny_configs,
    tiny_model,
)
from tests.support.uneven_models import ResidualMoe

Checkpoint = Callable[[str], Path]


@pytest.fixture
def deepspeed_moe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """DeepSpeed's layer class, in the group of one that ZeRO-3 has in a process too."""
    layer = pytest.importorskip("deepspeed.moe.layer", reason="DeepSpeed is the oracle")
    comm, groups = sys.modules["deepspeed.comm.comm"], sys.modules["deepspeed.utils.groups"]
    # Its shared-memory collectives would be compiled first, for minutes.
    monkeypatch.setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)
    ensure_lone_group()
    comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    yield layer.MoE
    groups._EXPERT_PARALLEL_GROUP.clear()
    groups._EXPERT_DATA_PARALLEL_GROUP.clear()


class _Mlp(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(dim, ffn_dim)
        self.dense_4h_to_h = nn.Linear(ffn_dim, dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(hidden), approximate="tanh"))


class _OutputOf(nn.Module):
    """DeepSpeed's layer gives its loss and counts too."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self._moe = moe

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._moe(hidden)[0]
        return output


def _theirs(layer: Any, ours: ResidualMoe, config: Any) -> nn.Module:
    """DeepSpeed's layer with the parameters of a mixture, by DeepSpeed's names."""
    moe = layer(
        config.n_embd,
        _Mlp(config.n_embd, config.n_inner),
        num_experts=len(ours.deepspeed_moe.experts.deepspeed_experts),
        k=config.topk,
        use_residual=config.mlp_type == "residual",
        drop_tokens=False,
        min_capacity=0,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    ).eval()
    moe.set_deepspeed_parallelism()
    moe.load_state_dict(ours.state_dict(), strict=True)
    return _OutputOf(moe)


@pytest.mark.parametrize("name", ["pr_moe", "deepspeed_moe_top2"])
def test_logits_and_tokens_are_those_of_deepspeeds_layers(
    checkpoint: Checkpoint, deepspeed_moe: Any, name: str
) -> None:
    model, config = tiny_model(name), tiny_configs()[name]
    swapped = 0
    for block in model.transformer.h:
        if isinstance(block.mlp, ResidualMoe):
            block.mlp = _theirs(deepspeed_moe, block.mlp, config)
            swapped += 1
    assert swapped == (2 if name == "pr_moe" else 1)
    prompt = prompt_tokens(19)
    logits = Stepper.load(checkpoint(name)).step({"a": prompt})["a"]
    torch.testing.assert_close(logits, reference_logits(model, prompt), atol=1e-4, rtol=1e-4)
    expected = reference_greedy(model, prompt, 20)
    assert len(set(expected)) > 3
    assert Stepper.load(checkpoint(name)).greedy(prompt, 20) == expected


def _config(**changes: Any) -> dict[str, Any]:
    config = json.loads(tiny_configs()["pr_moe"].to_json_string()) | {"n_layer": 6}
    return config | {"num_experts": [4, 8, 16], "expert_interval": 2} | changes


def test_every_interval_th_layer_has_its_number_of_experts() -> None:
    layers = arch_from_hf(_config()).layers
    counts = [layer.moe.gate.num_experts if layer.moe else 0 for layer in layers]
    assert counts == [0, 4, 0, 8, 0, 16]
    same = arch_from_hf(_config(num_experts=4, expert_interval=3)).layers
    assert [layer.moe is not None for layer in same] == [False, False, True] * 2
    one = arch_from_hf(_config(num_experts=[4, 1, 2])).layers
    assert (one[3].moe, one[3].ffn_dim) == (None, one[0].ffn_dim)


@pytest.mark.parametrize(
    ("changes", "param", "text"),
    [
        ({"num_experts": [4, 8]}, "num_experts", "each of the 3 layers that expert_interval 2"),
        ({"num_experts": [4, 0, 8]}, "num_experts", "positive"),
        ({"num_experts": None}, "num_experts", "whole number"),
        ({"num_experts": [4, 8, 2], "topk": 3}, "topk", "3 experts per token are more than"),
        ({"mlp_type": "shared"}, "mlp_type", "standard or residual"),
        ({"expert_interval": 0}, "expert_interval", "at least 1"),
        ({"per_layer_config": {"1": {"num_experts": 2}}}, "per_layer_config", "is read of Mixtral"),
    ],
)
def test_what_does_not_work_out_is_refused(changes: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        arch_from_hf(_config(**changes))
    assert caught.value.param == param
    assert text in f"{caught.value.cause} {caught.value.remedy}"
