"""The pool against a plain model: nothing leaks, nothing is handed out twice, LRU order holds."""

from __future__ import annotations

import random

import pytest
from engine_settings import engine_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.base.errors import InternalError
from replicas.engine.block_pool import BlockPool


class PoolModel:
    """Random operations on a pool, mirrored in plain dicts."""

    def __init__(self, num_blocks: int) -> None:
        self.evicted: list[int] = []
        self.pool = BlockPool(num_blocks, self.evicted.append)
        self.tables: list[list[int]] = []
        self.cached: set[int] = set()
        self.released_cached: list[int] = []

    def allocate(self) -> None:
        if self.pool.num_free == 0:
            with pytest.raises(InternalError, match="held"):
                self.pool.allocate()
            return
        self.evicted.clear()
        oldest = self.released_cached[0] if self.released_cached else None
        had_blank = self.pool.num_free > len(self.released_cached)
        block = self.pool.allocate()
        assert all(block not in table for table in self.tables)
        assert self.evicted == ([] if had_blank else [oldest])
        self.tables.append([block])
        self._now_held(block)
        self.cached.discard(block)

    def fork(self, pick: int) -> None:
        if self.tables:
            table = list(self.tables[pick % len(self.tables)])
            for block in table:
                self.pool.acquire(block)
            self.tables.append(table)

    def revive(self, pick: int) -> None:
        if self.released_cached:
            block = self.released_cached[pick % len(self.released_cached)]
            self.pool.acquire(block)
            self.tables.append([block])
            self._now_held(block)

    def free(self, pick: int) -> None:
        if self.tables:
            for block in self.tables.pop(pick % len(self.tables)):
                self.pool.release(block)
                if block in self.cached and not any(block in t for t in self.tables):
                    self.released_cached.append(block)

    def copy_on_write(self, pick: int) -> None:
        if not self.tables:
            return
        table = self.tables[pick % len(self.tables)]
        block = table[-1]
        if self.pool.num_references(block) < 2:
            with pytest.raises(InternalError, match="not shared"):
                self.pool.copy_on_write(block)
        elif self.pool.num_free:
            table[-1] = self.pool.copy_on_write(block)
            self._now_held(table[-1])
            self.cached.discard(table[-1])

    def cache(self, pick: int) -> None:
        if self.tables:
            block = self.tables[pick % len(self.tables)][0]
            self.pool.mark_cached(block)
            self.cached.add(block)

    def uncache(self, pick: int) -> None:
        if self.tables:
            block = self.tables[pick % len(self.tables)][0]
            self.pool.unmark_cached(block)
            self.cached.discard(block)

    def check(self) -> None:
        self.pool.check_invariants()
        held = {block for table in self.tables for block in table}
        assert self.pool.num_free == self.pool.num_blocks - len(held)
        for block in held:
            holders = sum(table.count(block) for table in self.tables)
            assert self.pool.num_references(block) == holders
            assert self.pool.is_cached(block) == (block in self.cached)

    def close(self) -> None:
        while self.tables:
            self.free(0)
        self.pool.check_invariants()
        assert self.pool.num_free == self.pool.num_blocks

    def _now_held(self, block: int) -> None:
        if block in self.released_cached:
            self.released_cached.remove(block)


class PoolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model = PoolModel(5)

    @rule()
    def allocate(self) -> None:
        self.model.allocate()

    @precondition(lambda self: self.model.tables)
    @rule(pick=st.integers(0, 20))
    def fork(self, pick: int) -> None:
        self.model.fork(pick)

    @rule(pick=st.integers(0, 20))
    def revive(self, pick: int) -> None:
        self.model.revive(pick)

    @precondition(lambda self: self.model.tables)
    @rule(pick=st.integers(0, 20))
    def free(self, pick: int) -> None:
        self.model.free(pick)

    @precondition(lambda self: self.model.tables)
    @rule(pick=st.integers(0, 20))
    def copy_on_write(self, pick: int) -> None:
        self.model.copy_on_write(pick)

    @precondition(lambda self: self.model.tables)
    @rule(pick=st.integers(0, 20))
    def cache(self, pick: int) -> None:
        self.model.cache(pick)

    @precondition(lambda self: self.model.tables)
    @rule(pick=st.integers(0, 20))
    def uncache(self, pick: int) -> None:
        self.model.uncache(pick)

    @invariant()
    def sound(self) -> None:
        self.model.check()

    def teardown(self) -> None:
        self.model.close()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = engine_settings(max_examples=60, stateful_step_count=40)


def test_a_hundred_thousand_operations_leak_nothing() -> None:
    rng = random.Random(1)
    operations = ("fork", "revive", "free", "free", "copy_on_write", "cache", "uncache")
    for num_blocks in (1, 3, 17, 40):
        model = PoolModel(num_blocks)
        for count in range(25_000):
            if rng.random() < 0.35:
                model.allocate()
            else:
                getattr(model, rng.choice(operations))(rng.randrange(1000))
            while len(model.tables) > 2 * num_blocks:
                model.free(rng.randrange(1000))
            if count % 250 == 0:
                model.check()
        model.close()


def test_cached_content_survives_release_until_it_is_the_oldest_left() -> None:
    evicted: list[int] = []
    pool = BlockPool(3, evicted.append)
    blocks = [pool.allocate() for _ in range(3)]
    assert blocks == [0, 1, 2]
    pool.mark_cached(0)
    pool.mark_cached(1)
    for block in (1, 0, 2):
        pool.release(block)
    assert pool.allocate() == 2
    assert evicted == []
    assert [pool.allocate(), pool.allocate()] == [1, 0]
    assert evicted == [1, 0]


def test_misuse_is_an_error_and_changes_nothing() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    with pytest.raises(InternalError, match="blank"):
        pool.acquire(1)
    pool.release(block)
    with pytest.raises(InternalError, match="more often"):
        pool.release(block)
    with pytest.raises(InternalError, match="not held"):
        pool.mark_cached(block)
    pool.check_invariants()
    with pytest.raises(InternalError, match="at least 1"):
        BlockPool(0)
