"""Policies: pure, deterministic, bounded by load, bounded in memory."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.policies.least_load import LeastLoad, load_of
from router.policies.prefix_affinity import PrefixAffinity
from router.policies.snapshot import ReplicaView, RequestInfo

counts = st.integers(0, 50)
views = st.builds(
    ReplicaView,
    replica_id=st.sampled_from(["a", "b", "c", "d"]),
    num_running=counts,
    num_waiting=counts,
    num_waiting_tokens=st.integers(0, 5000),
    kv_blocks_total=st.just(100),
    kv_blocks_free=st.integers(0, 100),
    num_in_flight=counts,
    unstarted_tokens=st.integers(0, 5000),
)
snapshots = st.lists(views, min_size=1, max_size=4, unique_by=lambda view: view.replica_id)
prompts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def info(prompt, salt="") -> RequestInfo:
    return RequestInfo(prompt_token_ids=prompt, cache_salt=salt)


def small() -> PrefixAffinity:
    return PrefixAffinity(chunk_tokens=4, capacity=50, slack=2.0)


@given(snapshots)
def test_least_load_is_the_minimum(snapshot):
    chosen = LeastLoad().choose(info([1]), snapshot)
    by_id = {view.replica_id: view for view in snapshot}
    assert load_of(by_id[chosen]) == min(map(load_of, snapshot))


@given(views)
def test_load_grows_with_work_and_is_never_negative(view):
    more = ReplicaView(
        replica_id="x",
        num_running=view.num_running + 1,
        num_waiting=view.num_waiting,
        num_waiting_tokens=view.num_waiting_tokens,
        kv_blocks_total=100,
        kv_blocks_free=view.kv_blocks_free,
        num_in_flight=view.num_in_flight + 1,
        unstarted_tokens=view.unstarted_tokens,
    )
    assert 0 <= load_of(view) < load_of(more)


@given(st.lists(st.tuples(prompts, snapshots), max_size=30))
def test_affinity_is_deterministic_listed_bounded_in_load_and_memory(calls):
    first, second = small(), small()
    for prompt, snapshot in calls:
        chosen = first.choose(info(prompt), snapshot)
        assert chosen == second.choose(info(prompt), snapshot)
        by_id = {view.replica_id: view for view in snapshot}
        saved = (len(prompt) // 4) * 4 / 256
        assert load_of(by_id[chosen]) <= min(map(load_of, snapshot)) + 2.0 + saved
        assert len(first) <= 50


def test_a_known_prefix_goes_home_and_an_unknown_one_to_the_idlest():
    policy = small()
    idle_a = [ReplicaView(replica_id="a"), ReplicaView(replica_id="b", num_running=1)]
    idle_b = [ReplicaView(replica_id="a", num_running=1), ReplicaView(replica_id="b")]
    assert policy.choose(info([1] * 8), idle_a) == "a"
    assert policy.choose(info([1] * 8 + [2] * 8), idle_b) == "a"
    assert policy.choose(info([3] * 8), idle_b) == "b"
    assert policy.choose(info([1] * 3), idle_b) == "b"


def test_salt_separates_prefixes():
    policy = small()
    assert policy.choose(info([1] * 8), [ReplicaView(replica_id="a")]) == "a"
    both = [ReplicaView(replica_id="b"), ReplicaView(replica_id="a")]
    assert policy.choose(info([1] * 8, salt="other"), both) == "b"
    assert policy.choose(info([1] * 8), both) == "a"


def test_a_hot_prefix_spills_over_the_bound():
    policy = small()
    policy.choose(info([1] * 8), [ReplicaView(replica_id="a")])
    busy = [ReplicaView(replica_id="a", num_running=3), ReplicaView(replica_id="b")]
    assert policy.choose(info([1] * 8), busy) == "b"
    near = [ReplicaView(replica_id="a", num_running=4), ReplicaView(replica_id="b", num_running=3)]
    assert policy.choose(info([1] * 8), near) == "b", "the prefix has moved with the spill"


def test_a_gone_replica_is_forgotten():
    policy = small()
    policy.choose(info([1] * 40), [ReplicaView(replica_id="a")])
    assert len(policy) == 10
    policy.forget("a")
    assert len(policy) == 0


def test_shared_heads_outlive_tails():
    policy = PrefixAffinity(chunk_tokens=1, capacity=3)
    policy.choose(info([1, 2, 3, 4, 5]), [ReplicaView(replica_id="a")])
    assert len(policy) == 3
    both = [ReplicaView(replica_id="b"), ReplicaView(replica_id="a")]
    assert policy.choose(info([1, 9]), both) == "a"


@pytest.mark.parametrize("token", [0, 2**31 - 1])
def test_any_token_id_can_be_hashed(token):
    assert small().choose(info([token] * 8), [ReplicaView(replica_id="a")]) == "a"
