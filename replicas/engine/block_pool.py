"""The pool of KV blocks of one replica: who holds a block, and which block is handed out next.

Owns reference counts and the order of reuse. It knows that a block is cached, never what is in it.
A block is in exactly one of three places:

    held (references >= 1)   |   evictable (0 references, cached, LRU)   |   blank (0, not cached)

Blank blocks are handed out first, then the cached block whose last reference went longest ago.
Block 0 is an ordinary block: padding in a worker's block table is never read, so no null block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from cluster.base.errors import InternalError


class BlockPool:
    """Blocks `0 .. num_blocks - 1`.

    Args:
        num_blocks: size of the pool, >= 1.
        on_evict: called with a cached block just before it is handed out for other content.
    """

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None] | None = None) -> None:
        if num_blocks < 1:
            raise InternalError(f"A KV pool needs at least 1 block, got {num_blocks}.")
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._references = [0] * num_blocks
        self._cached = bytearray(num_blocks)
        self._blank = list(range(num_blocks))[::-1]
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks nobody holds; cached ones count, because they can be evicted."""
        return len(self._blank) + len(self._evictable)

    def num_references(self, block: int) -> int:
        """How many block tables hold the block."""
        return self._references[block]

    def is_cached(self, block: int) -> bool:
        """Whether the block's content was announced with `mark_cached`."""
        return bool(self._cached[block])

    def allocate(self) -> int:
        """Hand out a block with one reference; its old content, if cached, is evicted.

        Raises:
            InternalError: every block is held; callers look at `num_free` first.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._evictable:
            block, _ = self._evictable.popitem(last=False)
            self._cached[block] = 0
            if self._on_evict is not None:
                self._on_evict(block)
        else:
            raise InternalError(f"All {self.num_blocks} KV blocks are held.")
        self._references[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Add a reference to a held block, or revive a cached one that nobody holds.

        Raises:
            InternalError: the block is blank, so there is no content to share.
        """
        if self._references[block] == 0:
            if block not in self._evictable:
                raise InternalError(f"KV block {block} is blank and cannot be shared.")
            del self._evictable[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Drop a reference. The last one of a cached block makes it the newest evictable one.

        Raises:
            InternalError: nobody holds the block.
        """
        references = self._references[block] - 1
        if references < 0:
            raise InternalError(f"KV block {block} was released more often than taken.")
        self._references[block] = references
        if references:
            return
        if self._cached[block]:
            self._evictable[block] = None
        else:
            self._blank.append(block)

    def copy_on_write(self, block: int) -> int:
        """Trade a reference to a shared block for a block of one's own.

        Returns:
            The new block; the caller has its content copied before anything is written to it.

        Raises:
            InternalError: the block is not shared, or every block is held.
        """
        if self._references[block] < 2:
            raise InternalError(f"KV block {block} is not shared; write to it in place.")
        target = self.allocate()
        self._references[block] -= 1
        return target

    def mark_cached(self, block: int) -> None:
        """Keep the content of a held block after its last release, until it is evicted.

        Raises:
            InternalError: nobody holds the block.
        """
        if self._references[block] == 0:
            raise InternalError(f"KV block {block} is not held and cannot become cached.")
        self._cached[block] = 1

    def unmark_cached(self, block: int) -> None:
        """A held block is about to be written to: forget that its content is cached.

        Raises:
            InternalError: nobody holds the block.
        """
        if self._references[block] == 0:
            raise InternalError(f"KV block {block} is not held and cannot be written to.")
        self._cached[block] = 0

    def check_invariants(self) -> None:
        """For tests: every block is in exactly one place and every count is sound.

        Raises:
            InternalError: what is wrong.
        """
        blank = set(self._blank)
        if len(blank) != len(self._blank):
            raise InternalError("A block is twice in the blank list.")
        for block, references in enumerate(self._references):
            places = (references > 0, block in self._evictable, block in blank)
            if references < 0 or sum(places) != 1:
                raise InternalError(
                    f"Block {block}: {references} references, evictable {places[1]}, "
                    f"blank {places[2]}."
                )
            if (block in self._evictable and not self._cached[block]) or (
                block in blank and self._cached[block]
            ):
                raise InternalError(f"Block {block} waits in the wrong free list.")
