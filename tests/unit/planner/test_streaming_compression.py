"""When records are compressed: by what disk, codec and weights allow, and never in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import LLAMA_3_8B, write_checkpoint
from planned_models import GPU_BOX, LAPTOP, node, rates_for_tests

from cluster.base.errors import ConfigError
from cluster.base.plan import ClusterPlan, ModelPlan
from cluster.base.spec import ClusterSpec
from cluster.dist.topology import Topology
from cluster.planner.explain import explain, explain_reasons
from cluster.planner.planner import make_plan
from offload.machine_rates import RatesRequest
from offload.rates import Rates
from offload.stored_share import USUAL_SHARE


def planned(
    tmp_path: Path,
    topology: Topology = LAPTOP,
    *,
    rates: dict[str, float] | None = None,
    offload: dict[str, Any] | None = None,
    **model: Any,
) -> ClusterPlan:
    """On a machine that decodes 8 GB/s beside its computing threads, if nothing else is said."""

    def measured(request: RatesRequest) -> Rates:
        decoding = {"decode_bytes_per_s": 8e9} | (rates or {})
        return replace(rates_for_tests(request), **decoding)

    write_checkpoint(tmp_path / "ckpt", LLAMA_3_8B)
    entry = {
        "name": "m",
        "path": "ckpt",
        "engine": "offload",
        "limits": {"max_context": 2048},
        "offload": {"device_memory": "4GiB", **(offload or {})},
        **model,
    }
    spec = ClusterSpec.model_validate({"models": [entry]})
    return make_plan(spec, topology, directory=tmp_path, rates=measured)


def only(plan: ClusterPlan) -> ModelPlan:
    (model,) = plan.models
    return model


def test_a_model_bound_by_the_disk_is_compressed_and_so_much_faster(tmp_path: Path) -> None:
    alone = {"resident": 0, "ring_slots": 4, "objective": "latency"}
    auto = only(planned(tmp_path, offload=alone))
    none = only(planned(tmp_path, offload={**alone, "compression": "none"}))
    assert auto.offload.compression == "lossless"
    assert none.offload.compression == "none"
    assert auto.memory.weights_bytes == none.memory.weights_bytes
    assert auto.speed.disk_bytes == pytest.approx(USUAL_SHARE * none.speed.disk_bytes)
    faster = auto.speed.chosen.tokens_per_s / none.speed.chosen.tokens_per_s
    assert faster == pytest.approx(1 / USUAL_SHARE, rel=0.05)
    assert auto.speed.rates["decoding"] == 8e9
    assert "decoded at 8 GB/s" in auto.reasons["offload.compression"]
    assert "compressed to 68%" in auto.reasons["engine"]
    assert "offload.compression" not in none.reasons


def test_memory_that_is_left_holds_parts_of_records(tmp_path: Path) -> None:
    """Against any number of resident layers in the same memory; the plan tells it."""
    room = {"device_memory": "6GiB", "objective": "latency", "compression": "lossless"}
    fast = {"decode_bytes_per_s": 30e9}
    plan = planned(tmp_path, offload=room, rates=fast)
    held = only(plan)
    assert held.offload.held_bytes > 2**30
    assert not any("." in unit for unit in held.offload.resident_units)
    for resident in range(10):
        kept = only(planned(tmp_path, offload={**room, "resident": resident}, rates=fast))
        assert kept.offload.held_bytes == 0
        assert kept.speed.chosen.tokens_per_s < held.speed.chosen.tokens_per_s
    assert "held in memory as stored" in held.reasons["engine"]
    assert held.speed.chosen.held_bytes == held.offload.held_bytes
    assert any("HELD" in table.columns for table in explain_reasons(plan))
    assert held.memory.weights_bytes <= 6 * 2**30


def test_a_codec_slower_than_the_disk_is_not_used(tmp_path: Path) -> None:
    model = only(planned(tmp_path, rates={"decode_bytes_per_s": 2e9}))
    assert model.offload.compression == "none"
    assert "decoding is too slow" in model.reasons["offload.compression"]
    assert model.speed.stored_share == 1.0
    assert "decoding" not in model.speed.rates
    alone = {"resident": 0, "objective": "latency", "compression": "lossless"}
    asked = planned(tmp_path, rates={"decode_bytes_per_s": 2e9}, offload=alone)
    assert only(asked).offload.compression == "lossless"
    assert only(asked).speed.chosen.bound == "decoding of compressed records"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"offload": {"pack": False}}, "not packed"),
        ({"dtype": "float32", "offload": {"device_memory": "8GiB"}}, "only bfloat16 weights"),
        ({"offload": {"precision": "int8"}}, "int8 codes"),
        ({"rates": {"decode_bytes_per_s": 0.0}}, "cannot be compiled"),
        ({"offload": {"share_resident": "always"}}, "share pages"),
    ],
)
def test_where_there_can_be_none_auto_says_why_and_lossless_is_refused(
    tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    auto = only(planned(tmp_path, **changes))
    assert auto.offload.compression == "none"
    assert why in auto.reasons["offload.compression"]
    offload = {**changes.get("offload", {}), "compression": "lossless"}
    with pytest.raises(ConfigError) as refused:
        planned(tmp_path, **{**changes, "offload": offload})
    assert refused.value.param == "models[0].offload.compression"
    assert refused.value.remedy


def test_replicas_of_a_node_share_pages_unless_compression_is_asked_for(tmp_path: Path) -> None:
    box = Topology(nodes=(node(8, 64),))
    some = {"device_memory": "10GiB", "resident": 4}
    shared = only(planned(tmp_path, box, replicas=2, offload=some))
    assert (shared.offload.share_resident, shared.offload.compression) == (True, "none")
    asked = only(planned(tmp_path, box, replicas=2, offload={**some, "compression": "lossless"}))
    assert (asked.offload.share_resident, asked.offload.compression) == (False, "lossless")


def test_formats_compete_and_lossless_leaves_only_the_native_one(tmp_path: Path) -> None:
    free = only(planned(tmp_path, offload={"precision": "auto"}))
    assert (free.offload.precision, free.offload.compression) == ("int4", "none")
    asked = {"precision": "auto", "compression": "lossless"}
    held = only(planned(tmp_path, offload=asked))
    assert (held.offload.precision, held.offload.compression) == ("native", "lossless")


def test_the_plan_shows_it(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    tables = {table.title: table for table in explain(plan) + explain_reasons(plan)}
    homes = tables["Where the weights of streamed models are"]
    assert homes.rows[0][-1] == "native, lossless to 68%"
    frontier = tables["Batch against speed: m"]
    assert all("native, lossless" in row for row in frontier.rows)
    assert "decoding 8 GB/s" in tables["Predicted speed of streamed models"].rows[0][-1]


def test_a_gpu_gets_records_as_they_are(tmp_path: Path) -> None:
    (model,) = planned(tmp_path, GPU_BOX, offload={}).models
    assert model.offload.compression == "none"
    assert "not decoded on GPUs" in model.reasons["offload.compression"]
    with pytest.raises(ConfigError, match="not decoded on GPUs"):
        planned(tmp_path, GPU_BOX, offload={"compression": "lossless"})
