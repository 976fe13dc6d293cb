"""Planning beside what runs: running models keep their decisions, new ones get what is left."""

from dataclasses import replace

import pytest
from fake_checkpoints import write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.models import WordLevel

from cluster.base.load import parse_cluster_text
from cluster.base.problems import ClusterFileError
from cluster.control.next_plan import next_plan
from cluster.control.reservations import TOKEN_CPUS, alone_model
from cluster.dist.topology import Node, Topology
from cluster.planner.hub import Hub
from cluster.planner.plan_file import plan_file

LAPTOP = Topology(nodes=(Node(node_id="n", host="n", cores=2, memory_bytes=16 * 2**30),))
HUB = Hub(offline=True)


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    write_checkpoint(folder / "ckpt")
    BackendTokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(folder / "ckpt/tokenizer.json"))
    return lambda text: parse_cluster_text(text, folder / "c.yaml")


def entries(**replicas: int) -> str:
    lines = [f"  - {{name: {name}, path: ckpt, replicas: {n}}}\n" for name, n in replicas.items()]
    return "models:\n" + "".join(lines)


def without_place(model):
    return replace(model, replicas=0, nodes=(), overflow=None)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_running_models_keep_every_decision(parse, before, after, others):
    running = plan_file(parse(entries(a=before)), LAPTOP, HUB)
    more = {"b": others} if others else {}
    follow = next_plan(running, parse(entries(a=after, **more)), LAPTOP, HUB)
    assert without_place(follow.models[0]) == without_place(running.models[0])
    assert [model.replicas for model in follow.models] == [after, *more.values()]
    held = sum(m.replicas * m.num_ranks * m.memory.total_bytes for m in follow.models)
    assert held <= LAPTOP.nodes[0].memory_bytes


def test_the_gateway_takes_what_the_replicas_do(parse):
    running = plan_file(parse(entries(a=1)), LAPTOP, HUB)
    follow = next_plan(running, parse(entries(a=3)), LAPTOP, HUB)
    of_one = running.gateway.limits.max_active_requests
    assert follow.gateway.limits.max_active_requests == 3 * of_one


def test_threads_beyond_the_cores_are_told_of(parse):
    running = plan_file(parse(entries(a=1)), LAPTOP, HUB)
    follow = next_plan(running, parse(entries(a=2)), LAPTOP, HUB)
    assert any("4 compute threads will share 2 cores" in text for text in follow.warnings)


def test_replicas_that_do_not_fit_are_refused_by_line(parse):
    small = Topology(nodes=(replace(LAPTOP.nodes[0], memory_bytes=3 * 2**30),))
    running = plan_file(parse(entries(a=1)), small, HUB)
    with pytest.raises(ClusterFileError, match=r"c\.yaml:2: models\[0\]"):
        next_plan(running, parse(entries(a=40)), small, HUB)


def test_an_overflow_can_come_with_its_model(parse):
    running = plan_file(parse(entries(a=1)), LAPTOP, HUB)
    text = "models:\n  - {name: a, path: ckpt, overflow: {to: b}}\n  - {name: b, path: ckpt}\n"
    follow = next_plan(running, parse(text), LAPTOP, HUB)
    assert follow.models[0].overflow.model == "b"
    with pytest.raises(ClusterFileError, match="no model of this file"):
        next_plan(running, parse(text.partition("  - {name: b")[0]), LAPTOP, HUB)


def test_automatic_reservations_shrink_in_a_runtime_of_our_own(parse):
    (model,) = plan_file(parse(entries(a=1)), LAPTOP, HUB).models
    assert model.cpus_per_rank > 1
    assert alone_model(model).cpus_per_rank == TOKEN_CPUS
    text = "models:\n  - {name: a, path: ckpt, resources: {cpus_per_rank: 1.5}}\n"
    (asked,) = plan_file(parse(text), LAPTOP, HUB).models
    assert alone_model(asked).cpus_per_rank == 1.5
