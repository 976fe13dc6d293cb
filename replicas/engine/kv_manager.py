"""Block tables of live requests: allocation, prefix reuse, forks with copy-on-write.

Sole user of the pool and the prefix cache. For a request between plans

    [ answered, full, maybe cached | answered     | planned      | nothing ]
    0                                num_answered   num_computed   len(table) * block_size

the table is long enough for `num_computed_tokens`, and exactly so but for blocks that a rejected
draft left for the tokens to come; nobody else holds those. A step is planned to write to a block
only while the block has one reference and is not cached; `allocate_slots` makes that so. Until the
step has run the block may get sharers (forks) that do not read what it writes, or be freed and
handed out again: ranks execute plans in order, so a later plan's copies and writes come after it.
Content enters the prefix cache only after the step that computed it has answered, which is also
when its tokens are known. Blocks behind a sliding window are kept; freeing them early would
release a table's head here and leave the worker's table as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.base.errors import InternalError
from replicas.engine.block_pool import BlockPool
from replicas.engine.prefix_cache import HashChain, PrefixCache
from replicas.engine.request import EngineRequest


@dataclass(frozen=True, slots=True)
class BlockGrant:
    """What a step changes in a request's block table."""

    new_blocks: tuple[int, ...] = ()
    replaced: tuple[tuple[int, int], ...] = ()
    """(index in block table, new block id)."""
    copies: tuple[tuple[int, int], ...] = ()
    """(source block, target block)."""


_NOTHING = BlockGrant()


class _Table:
    """One request's blocks; the first `num_registered` were offered to the prefix cache."""

    __slots__ = ("blocks", "num_registered")

    def __init__(self, blocks: list[int], num_registered: int) -> None:
        self.blocks = blocks
        self.num_registered = num_registered


class KvManager:
    """Blocks of one replica.

    Args:
        num_blocks: size of the pool.
        block_size: tokens per block.
        prefix_caching: whether full blocks are kept and found again.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.block_size = block_size
        self._cache = PrefixCache() if prefix_caching else None
        on_evict = None if self._cache is None else self._cache.evict
        self._pool = BlockPool(num_blocks, on_evict)
        self._tables: dict[int, _Table] = {}
        self._chains: dict[int, HashChain] = {}

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks no live request holds."""
        return self._pool.num_free

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def block_table(self, request: EngineRequest) -> Sequence[int]:
        """The request's blocks in order of position; empty when it holds none."""
        table = self._tables.get(request.key)
        return table.blocks if table else ()

    def holds_blocks(self, request: EngineRequest) -> bool:
        """Whether the request holds any block."""
        return request.key in self._tables

    def find_prefix(self, request: EngineRequest) -> list[int]:
        """Cached blocks that answer the start of the request, not yet taken.

        At most up to, and never including, the last known token: a step needs one to compute.
        """
        cache = self._cache
        if cache is None or request.must_see_prompt:
            return []
        return self._cached_blocks(cache, request.token_ids, self._chain(request))

    def num_cached_tokens(self, token_ids: Sequence[int], chain: HashChain) -> int:
        """How much of a prompt that is not here yet would be found; takes nothing.

        Args:
            chain: of this prompt; grown as far as the answer needs, so that several caches can
                be asked for the price of one hash per block.
        """
        if self._cache is None:
            return 0
        return len(self._cached_blocks(self._cache, token_ids, chain)) * self.block_size

    def _cached_blocks(
        self, cache: PrefixCache, tokens: Sequence[int], chain: HashChain
    ) -> list[int]:
        size = self.block_size
        found: list[int] = []
        for index in range((len(tokens) - 1) // size):
            content = tokens[index * size : (index + 1) * size]
            block = cache.find(chain.digest(index, tokens), content)
            if block is None:
                break
            found.append(block)
        return found

    def allocate_slots(
        self,
        request: EngineRequest,
        num_tokens: int,
        prefix: Sequence[int] = (),
        headroom: int = 0,
    ) -> BlockGrant | None:
        """Make room for the next `num_tokens` tokens; all or nothing.

        Args:
            prefix: blocks from `find_prefix` of a request without a table; they are taken, and
                the tokens are counted from their end.
            headroom: blocks that must be free afterwards.

        Returns:
            The change, or None when there are too few free blocks (nothing has changed then).
        """
        pool, size = self._pool, self.block_size
        table = self._tables.get(request.key)
        blocks = table.blocks if table else []
        start = request.num_computed_tokens if table else len(prefix) * size
        num_new = max(0, -(-(start + num_tokens) // size) - len(blocks) - len(prefix))
        # Only the tail can be shared or cached and written to: all blocks before it are full and
        # computed, and those behind it, left by a rejected draft, nobody else has seen.
        tail_index = start // size if start % size and blocks else None
        tail = blocks[tail_index] if tail_index is not None else None
        copies_tail = tail is not None and pool.num_references(tail) > 1
        need = num_new + copies_tail
        if prefix:
            need += sum(1 for block in prefix if pool.num_references(block) == 0)
        if need and need + headroom > pool.num_free:
            return None
        if table is None:
            for block in prefix:
                pool.acquire(block)
            table = self._tables[request.key] = _Table(list(prefix), len(prefix))
        if num_new == 0 and tail is not None and not copies_tail and not pool.is_cached(tail):
            return _NOTHING
        return self._extend(table, tail_index, num_new)

    def register_computed(self, request: EngineRequest) -> None:
        """Offer blocks that became full by an answered step to the prefix cache."""
        table = self._tables.get(request.key)
        num_full = request.num_answered_tokens // self.block_size
        if self._cache is None or table is None or num_full <= table.num_registered:
            return
        chain, size, tokens = self._chain(request), self.block_size, request.token_ids
        for index in range(table.num_registered, num_full):
            block = table.blocks[index]
            content = tokens[index * size : (index + 1) * size]
            if self._cache.insert(chain.digest(index, tokens), content, block):
                self._pool.mark_cached(block)
        table.num_registered = num_full

    def fork(self, parent: EngineRequest, child: EngineRequest) -> None:
        """Give `child` a share in the blocks of the parent's prompt but for its last token.

        Sets how much of the child is computed; nothing is copied until one of them writes.

        Raises:
            InternalError: the parent's prompt is not computed, or the child has blocks.
        """
        table = self._tables.get(parent.key)
        if table is None or parent.num_answered_tokens < child.num_prompt_tokens:
            raise InternalError(f"Request {parent.request_id} has no prompt to fork yet.")
        if child.key in self._tables:
            raise InternalError(f"Choice {child.index} of {child.request_id} has blocks already.")
        num_shared_tokens = child.num_prompt_tokens - 1
        child.num_computed_tokens = child.num_answered_tokens = num_shared_tokens
        if num_shared_tokens == 0:
            return
        blocks = table.blocks[: self.num_blocks_for(num_shared_tokens)]
        for block in blocks:
            self._pool.acquire(block)
        num_full = num_shared_tokens // self.block_size
        self._tables[child.key] = _Table(blocks, num_full)
        if self._cache is not None:
            # The parent may have output already, so its chain may go on with blocks of its own.
            self._chains[child.key] = self._chain(parent).copy(num_full)

    def release(self, request: EngineRequest) -> None:
        """Let go of all blocks (preemption); what is cached stays until it is evicted."""
        table = self._tables.pop(request.key, None)
        if table is not None:
            # Tail first, so that the least useful block of the prefix is evicted first.
            for block in reversed(table.blocks):
                self._pool.release(block)

    def forget(self, request: EngineRequest) -> None:
        """Let go of everything about a request that has ended."""
        self.release(request)
        self._chains.pop(request.key, None)

    def check_invariants(self) -> None:
        """For tests: the pool is sound and its references are exactly the tables' entries.

        Raises:
            InternalError: what is wrong.
        """
        self._pool.check_invariants()
        held = [0] * self.num_blocks
        for table in self._tables.values():
            for block in table.blocks:
                held[block] += 1
        for block, count in enumerate(held):
            if count != self._pool.num_references(block):
                raise InternalError(f"Block {block} has {count} holders but other references.")
            if self._pool.is_cached(block) != (self._cache is not None and block in self._cache):
                raise InternalError(f"Pool and cache disagree whether block {block} is cached.")

    def _extend(self, table: _Table, tail_index: int | None, num_new: int) -> BlockGrant:
        """Make the tail writable and append blocks; the pool has enough of them."""
        pool, blocks = self._pool, table.blocks
        replaced: tuple[tuple[int, int], ...] = ()
        copies: tuple[tuple[int, int], ...] = ()
        tail = blocks[tail_index] if tail_index is not None else None
        if tail_index is not None and tail is not None and pool.num_references(tail) > 1:
            blocks[tail_index] = pool.copy_on_write(tail)
            replaced = ((tail_index, blocks[tail_index]),)
            copies = ((tail, blocks[tail_index]),)
        elif tail is not None and self._cache is not None and pool.is_cached(tail):
            # The last sharer recomputes the last token of a full block in place.
            self._cache.evict(tail)
            pool.unmark_cached(tail)
        new_blocks = tuple(pool.allocate() for _ in range(num_new))
        blocks.extend(new_blocks)
        return BlockGrant(new_blocks, replaced, copies)

    def _chain(self, request: EngineRequest) -> HashChain:
        chain = self._chains.get(request.key)
        if chain is None:
            chain = self._chains[request.key] = HashChain(self.block_size, request.cache_salt)
        return chain
