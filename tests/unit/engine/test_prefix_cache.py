from __future__ import annotations

import random

from replicas.engine.prefix_cache import HashChain, PrefixCache


def test_a_digest_names_tokens_prefix_and_salt() -> None:
    tokens = [1, 2, 3, 4, 5, 6]
    digests = {HashChain(2, "").digest(index, tokens) for index in range(3)}
    assert len(digests) == 3
    assert HashChain(2, "").digest(2, tokens) == HashChain(2, "").digest(2, list(tokens))
    assert HashChain(2, "").digest(1, [9, 2, 3, 4]) != HashChain(2, "").digest(1, tokens)
    assert HashChain(2, "tenant").digest(0, tokens) not in digests
    assert HashChain(2, "\ud800").digest(0, tokens) not in digests


def test_a_copy_grows_on_its_own() -> None:
    chain = HashChain(2, "")
    chain.digest(0, [1, 2])
    twin = chain.copy(1)
    assert twin.digest(1, [1, 2, 3, 4]) != chain.digest(1, [1, 2, 5, 6])
    assert twin.digest(0, []) == chain.digest(0, [])


def test_truncated_collisions_cost_a_miss_and_never_a_wrong_block() -> None:
    rng = random.Random(3)
    cache = PrefixCache(index_bytes=1)
    content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
    for block in range(2000):
        tokens = (rng.randrange(100), rng.randrange(100))
        digest = HashChain(2, "").digest(0, tokens)
        if cache.insert(digest, tokens, block):
            content[block] = digest, tokens
    assert 200 < len(cache) <= 256
    assert len(content) == len(cache)
    for tokens in ((a, b) for a in range(100) for b in range(100)):
        found = cache.find(HashChain(2, "").digest(0, tokens), tokens)
        assert found is None or content[found][1] == tokens


def test_equal_full_digest_with_other_tokens_is_a_miss() -> None:
    cache = PrefixCache()
    cache.insert(b"x" * 32, (1, 2), 5)
    assert cache.find(b"x" * 32, (1, 2)) == 5
    assert cache.find(b"x" * 32, (1, 3)) is None
    assert cache.find(b"x" * 8 + b"y" * 24, (1, 2)) is None


def test_the_first_holder_stays_and_eviction_forgets() -> None:
    cache = PrefixCache()
    assert cache.insert(b"a" * 32, (1,), 0)
    assert not cache.insert(b"a" * 32, (1,), 1)
    assert not cache.insert(b"b" * 32, (2,), 0)
    cache.evict(1)
    assert cache.find(b"a" * 32, (1,)) == 0
    cache.evict(0)
    assert cache.find(b"a" * 32, (1,)) is None
    assert len(cache) == 0
