from __future__ import annotations

import dataclasses

import pytest
from simulated_executor import request

from cluster.base.errors import InternalError
from replicas.api import Pooling
from replicas.engine.kv_manager import BlockGrant, KvManager
from replicas.engine.request import EngineRequest, make_choices


def live(prompt: list[int], key: int = 0, **fields: object) -> EngineRequest:
    return make_choices(request("r", prompt, **fields), key, 0.0, 128)[0]


def compute(kv: KvManager, choice: EngineRequest, num_tokens: int) -> BlockGrant:
    grant = kv.allocate_slots(choice, num_tokens)
    assert grant is not None
    choice.num_computed_tokens += num_tokens
    choice.num_answered_tokens = choice.num_computed_tokens
    kv.register_computed(choice)
    kv.check_invariants()
    return grant


def test_tables_grow_by_whole_blocks_and_only_when_needed() -> None:
    kv = KvManager(8, 4, True)
    choice = live(list(range(9)))
    assert compute(kv, choice, 3).new_blocks == (0,)
    assert compute(kv, choice, 1) == BlockGrant()
    assert compute(kv, choice, 5).new_blocks == (1, 2)
    assert list(kv.block_table(choice)) == [0, 1, 2]


def test_allocation_is_all_or_nothing() -> None:
    kv = KvManager(2, 4, True)
    choice = live(list(range(12)))
    assert kv.allocate_slots(choice, 12) is None
    assert kv.allocate_slots(choice, 8, headroom=1) is None
    assert (kv.num_free_blocks, kv.holds_blocks(choice)) == (2, False)
    assert kv.allocate_slots(choice, 8) is not None


def test_a_hit_never_covers_the_last_token() -> None:
    kv = KvManager(8, 4, True)
    first = live(list(range(8)))
    compute(kv, first, 8)
    kv.forget(first)
    assert kv.find_prefix(live(list(range(8)), key=1)) == [0]
    assert kv.find_prefix(live(list(range(9)), key=2)) == [0, 1]
    assert kv.find_prefix(live(list(range(9)), key=3, cache_salt="other")) == []
    assert kv.find_prefix(live(list(range(9)), key=4, prompt_logprobs=0)) == []
    assert kv.find_prefix(live(list(range(9)), key=5, pooling=Pooling.MEAN)) == []
    assert kv.find_prefix(live(list(range(9)), key=6, pooling=Pooling.LAST)) == [0, 1]


def test_a_hit_of_unheld_blocks_needs_free_blocks_too() -> None:
    kv = KvManager(3, 4, True)
    first = live(list(range(8)))
    compute(kv, first, 8)
    kv.forget(first)
    other = live([50, 51, 52], key=1)
    compute(kv, other, 3)
    again = live(list(range(9)), key=2)
    assert kv.find_prefix(again) == [0, 1]
    assert kv.allocate_slots(again, 1, [0, 1]) is None
    kv.forget(other)
    assert kv.allocate_slots(again, 1, [0, 1]) is not None
    kv.check_invariants()


def test_without_caching_nothing_is_found() -> None:
    kv = KvManager(8, 4, False)
    first = live(list(range(8)))
    compute(kv, first, 8)
    assert kv.find_prefix(live(list(range(9)), key=1)) == []


def test_duplicates_keep_the_first_block_cached() -> None:
    kv = KvManager(8, 4, True)
    twins = [live(list(range(5)), key=key) for key in range(2)]
    for twin in twins:
        assert kv.allocate_slots(twin, 5) is not None
    for twin in twins:
        twin.num_computed_tokens = twin.num_answered_tokens = 5
        kv.register_computed(twin)
    assert kv.find_prefix(live(list(range(5)), key=2)) == [0]
    for twin in twins:
        kv.forget(twin)
    kv.check_invariants()
    assert kv.num_free_blocks == 8


@pytest.mark.parametrize("num_prompt", [1, 3, 4, 5, 8])
def test_a_fork_shares_the_prompt_and_copies_the_tail_on_write(num_prompt: int) -> None:
    kv = KvManager(16, 4, True)
    parent = live(list(range(num_prompt)), n=3)
    compute(kv, parent, num_prompt)
    children = [dataclasses.replace(parent, key=key, num_computed_tokens=0) for key in (1, 2)]
    free = kv.num_free_blocks
    for child in children:
        kv.fork(parent, child)
        assert child.num_computed_tokens == num_prompt - 1
    assert kv.num_free_blocks == free
    tail = kv.block_table(parent)[-1]
    has_tail = (num_prompt - 1) % 4 != 0
    for child in children:
        grant = compute(kv, child, 1)
        new = kv.block_table(child)[-1]
        assert new != tail
        assert grant.copies == (((tail, new),) if has_tail else ())
        assert grant.new_blocks == (() if has_tail else (new,))
    parent.token_ids.append(60)
    assert compute(kv, parent, 1).copies == ()
    for choice in (parent, *children):
        kv.forget(choice)
    kv.check_invariants()
    assert kv.num_free_blocks == 16


def test_the_parent_copies_when_it_writes_first_and_the_last_sharer_writes_in_place() -> None:
    kv = KvManager(16, 4, True)
    parent = live(list(range(6)), n=2)
    compute(kv, parent, 6)
    child = dataclasses.replace(parent, key=1, token_ids=list(range(6)))
    kv.fork(parent, child)
    parent.token_ids.append(60)
    grant = compute(kv, parent, 1)
    assert grant.copies == ((1, 2),)
    assert grant.replaced == ((1, 2),)
    assert compute(kv, child, 1) == BlockGrant()
    assert list(kv.block_table(child)) == [0, 1]


def test_writing_in_place_to_a_full_cached_block_uncaches_it_first() -> None:
    kv = KvManager(16, 4, True)
    parent = live(list(range(8)), n=2)
    compute(kv, parent, 8)
    child = dataclasses.replace(parent, key=1, token_ids=list(range(8)))
    kv.fork(parent, child)
    kv.forget(parent)
    assert kv.find_prefix(live(list(range(9)), key=2)) == [0, 1]
    assert kv.allocate_slots(child, 1) == BlockGrant()
    kv.check_invariants()
    assert kv.find_prefix(live(list(range(9)), key=3)) == [0]
    child.num_computed_tokens = child.num_answered_tokens = 8
    kv.register_computed(child)
    assert kv.find_prefix(live(list(range(9)), key=4)) == [0, 1]


def test_forking_too_early_or_twice_is_an_error() -> None:
    kv = KvManager(16, 4, True)
    parent = live(list(range(6)), n=2)
    compute(kv, parent, 5)
    child = dataclasses.replace(parent, key=1)
    with pytest.raises(InternalError, match="no prompt"):
        kv.fork(parent, child)
    # Planned is not enough: the step has to answer.
    assert kv.allocate_slots(parent, 1) is not None
    parent.num_computed_tokens = 6
    with pytest.raises(InternalError, match="no prompt"):
        kv.fork(parent, child)
    parent.num_computed_tokens = 5
    compute(kv, parent, 1)
    kv.fork(parent, child)
    with pytest.raises(InternalError, match="already"):
        kv.fork(parent, child)


def test_eviction_takes_the_tail_of_a_prefix_before_its_head() -> None:
    kv = KvManager(4, 2, True)
    first = live([1, 2, 3, 4, 5, 6])
    compute(kv, first, 6)
    kv.forget(first)
    other = live([20, 21, 22], key=1)
    compute(kv, other, 3)
    assert kv.find_prefix(live([1, 2, 3, 4, 5, 6, 7], key=2)) == [0, 1]


def test_planned_blocks_are_not_found_before_their_step_has_answered() -> None:
    kv = KvManager(8, 4, True)
    first = live(list(range(9)))
    compute(kv, first, 4)
    assert kv.allocate_slots(first, 5) is not None
    first.num_computed_tokens = 9
    kv.register_computed(first)
    assert kv.find_prefix(live(list(range(9)), key=1)) == [0]
    first.num_answered_tokens = 9
    kv.register_computed(first)
    assert kv.find_prefix(live(list(range(9)), key=1)) == [0, 1]


def test_a_fork_of_a_parent_with_output_does_not_inherit_the_names_of_its_blocks() -> None:
    kv = KvManager(16, 2, True)
    parent = live([1, 2, 3, 4], n=2)
    parent.token_ids += [9, 9]
    compute(kv, parent, 6)
    child = dataclasses.replace(parent, key=1, token_ids=[1, 2, 3, 4], num_computed_tokens=0)
    kv.fork(parent, child)
    child.token_ids += [5, 6]
    compute(kv, child, 3)
    kv.forget(parent)
    kv.forget(child)
    assert len(kv.find_prefix(live([1, 2, 3, 4, 5, 6, 7], key=2))) == 3
    assert len(kv.find_prefix(live([1, 2, 3, 4, 9, 9, 7], key=3))) == 3
