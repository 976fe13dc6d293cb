"""What a leader derives from the plan of an expert-parallel replica: seats, slices, schemes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cluster.base.plan import MemoryPlan, ModelPlan, from_json, to_json
from replicas.leader.engine_parts import scheduler_config, scheme_chooser
from replicas.leader.seating import bundles, name_nodes, seat_ranks, strategy
from replicas.leader.worker_plans import Meetings, worker_plan
from replicas.worker.frames import LinkAddress
from replicas.worker.plan import WorkerPlan
from tests.support.lockstep_ranks import model_plan

EXPERT = model_plan(Path("/m"), dp=3, tp=2)
DENSE = dataclasses.replace(EXPERT, experts=None, dp_size=1)


def test_a_tensor_parallel_group_is_one_bundle_so_that_it_shares_a_node() -> None:
    plan = dataclasses.replace(EXPERT, cpus_per_rank=0.5, leader_cpus=0.1)
    assert bundles(plan) == [{"CPU": 0.1}, {"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}]
    assert strategy(plan) == "PACK"
    gpus = dataclasses.replace(DENSE, gpus_per_rank=1.0, leader_cpus=0.1)
    assert bundles(gpus) == [{"CPU": 0.1}, *[{"CPU": 1.0, "GPU": 1.0}] * 2]
    assert strategy(gpus) == "STRICT_PACK"


def test_ray_reserves_the_memory_that_ranks_take_of_their_node() -> None:
    memory = MemoryPlan(
        weights_bytes=700, kv_bytes=200, workspace_bytes=100, available_bytes=0, shared_bytes=300
    )
    plan = dataclasses.replace(EXPERT, memory=memory)
    assert [bundle.get("memory") for bundle in bundles(plan)] == [None, 1400.0, 1400.0, 1400.0]
    dense = dataclasses.replace(DENSE, memory=dataclasses.replace(memory, shared_bytes=0))
    assert [bundle.get("memory") for bundle in bundles(dense)] == [None, 1000.0, 1000.0]
    # Weights on a device are not the node's memory.
    gpus = dataclasses.replace(dense, device="cuda", gpus_per_rank=1.0)
    assert all("memory" not in bundle for bundle in bundles(gpus))


def test_a_node_keeps_its_name_and_one_that_takes_over_its_address_gets_another() -> None:
    first = name_nodes(["i1", "i2"], {"i1": "10.0.0.1", "i2": "10.0.0.2"}, {})
    assert first == {"i1": "10.0.0.1", "i2": "10.0.0.2"}
    later = {"i1": "10.0.0.1", "i2": "10.0.0.2", "i3abcdefghi": "10.0.0.2", "i4": "10.0.0.4"}
    assert name_nodes(["i1", "i3abcdefghi", "i4"], later, first) == {
        **first,
        "i3abcdefghi": "10.0.0.2/i3abcdef",
        "i4": "10.0.0.4",
    }
    shared = name_nodes(["a2345678x", "b2345678x"], {"a2345678x": "h", "b2345678x": "h"}, {})
    assert sorted(shared.values()) == ["h/a2345678", "h/b2345678"]


def test_ranks_are_numbered_node_by_node() -> None:
    seats = seat_ranks(EXPERT, ["a", "a", "b", "a"])
    assert [seat.bundle for seat in seats] == [1, 1, 3, 3, 2, 2]
    assert [seat.node for seat in seats] == ["a", "a", "a", "a", "b", "b"]
    assert [seat.bundle for seat in seat_ranks(DENSE, ["a", "a", "a"])] == [1, 2]


def test_every_rank_learns_where_its_groups_meet() -> None:
    meetings = Meetings(
        epoch="e",
        link=LinkAddress(host="h", port=9),
        secret="s",
        tensor_groups=(("h0", 10), ("h1", 11), ("h2", 12)),
        peers=("h0", 20),
        nodes=("a", "a", "a", "a", "b", "b"),
    )
    plans = [worker_plan(EXPERT, rank, meetings) for rank in range(6)]
    assert [plan.store_port for plan in plans] == [10, 10, 11, 11, 12, 12]
    assert [plan.tp_rank for plan in plans] == [0, 1, 0, 1, 0, 1]
    place = plans[5].experts
    assert place is not None
    assert (place.peers_host, place.peers_port) == ("h0", 20)
    assert place.node_of_W == meetings.nodes
    assert place.max_rows == 32
    assert from_json(WorkerPlan, to_json(plans[5])) == plans[5]
    assert from_json(ModelPlan, to_json(EXPERT)) == EXPERT
    assert worker_plan(DENSE, 1, meetings).experts is None
    fp8 = dataclasses.replace(DENSE, quantization="fp8")
    assert worker_plan(fp8, 1, meetings).quantization == "fp8"


def test_the_scheme_of_a_step_is_that_of_the_busiest_ranks_rows() -> None:
    choose = scheme_chooser([(4, "preposted", "few"), (16, "flat", "some"), (64, "x", "many")], 2)
    assert [choose(n)[0] for n in (1, 8, 9, 32, 33, 128, 1000)] == [
        "preposted",
        "preposted",
        "flat",
        "flat",
        "x",
        "x",
        "x",
    ]
    assert choose(8) == ("preposted", "few")
    assert scheduler_config(EXPERT).max_step_tokens == 64
