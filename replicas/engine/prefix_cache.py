"""What is in the cached KV blocks: a content index over full blocks, exact by construction.

A block's name is SHA-256 over (its parent's digest, its tokens); the chain starts from the
request's `cache_salt`, so tenants with different salts never meet. The index is keyed by a
truncated digest to stay small; a hit also needs the full digest and the block's own tokens to be
equal, so a truncated collision costs a miss and nothing else. Bounded by the pool: at most one
entry per block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

_INDEX_BYTES = 8


class HashChain:
    """Digests of one request's full blocks in order, grown on demand and never recomputed."""

    __slots__ = ("_block_size", "digests")

    def __init__(self, block_size: int, cache_salt: str) -> None:
        self._block_size = block_size
        self.digests: list[bytes] = [
            hashlib.sha256(cache_salt.encode("utf-8", "surrogatepass")).digest()
        ]
        """Entry 0 is the root; entry i + 1 names block i together with everything before it."""

    def digest(self, index: int, token_ids: Sequence[int]) -> bytes:
        """Digest of full block `index` of the request whose tokens are `token_ids`."""
        digests = self.digests
        while len(digests) <= index + 1:
            start = (len(digests) - 1) * self._block_size
            tokens = array("q", token_ids[start : start + self._block_size])
            digests.append(hashlib.sha256(digests[-1] + tokens.tobytes()).digest())
        return digests[index + 1]

    def copy(self, num_blocks: int) -> HashChain:
        """A chain of the same request's other choice, which shares the first `num_blocks`."""
        twin = HashChain.__new__(HashChain)
        twin._block_size = self._block_size
        twin.digests = self.digests[: num_blocks + 1]
        return twin


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: bytes
    token_ids: tuple[int, ...]
    block: int


class PrefixCache:
    """Index from block content to block id.

    Args:
        index_bytes: length of the truncated digest that keys the index.
    """

    def __init__(self, index_bytes: int = _INDEX_BYTES) -> None:
        self._index_bytes = index_bytes
        self._entries: dict[bytes, _Entry] = {}
        self._by_block: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def find(self, digest: bytes, token_ids: Sequence[int]) -> int | None:
        """The block that holds exactly this content after exactly this prefix, if any."""
        entry = self._entries.get(digest[: self._index_bytes])
        if entry is None or entry.digest != digest or entry.token_ids != tuple(token_ids):
            return None
        return entry.block

    def insert(self, digest: bytes, token_ids: Sequence[int], block: int) -> bool:
        """Index a block; False when its place is taken (a duplicate or a collision).

        The first holder stays: another block with equal content is worth nothing more.
        """
        index = digest[: self._index_bytes]
        if index in self._entries or block in self._by_block:
            return False
        self._entries[index] = _Entry(digest, tuple(token_ids), block)
        self._by_block[block] = index
        return True

    def evict(self, block: int) -> None:
        """Forget a block's content; unknown blocks are fine."""
        index = self._by_block.pop(block, None)
        if index is not None:
            del self._entries[index]
