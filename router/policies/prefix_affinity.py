"""Sends a request where most of its prompt is probably cached, unless that replica is too busy.

The index maps the hash of each prompt prefix, cut at multiples of `chunk_tokens`, to the replica
last sent that prefix; least recently used entries fall out at `capacity`. It is a guess about the
replicas' prefix caches, never a promise: a wrong guess costs a recomputation, not a wrong answer.
The bound: affinity may cost at most as much extra load as the cached tokens save (plus a slack), so
a hot prefix cannot pile all its traffic on one replica.
"""

from __future__ import annotations

import array
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from router.policies.least_load import TOKENS_PER_REQUEST, load_of
from router.policies.snapshot import ReplicaView, RequestInfo


class PrefixAffinity:
    """Prefix affinity bounded by load.

    Args:
        chunk_tokens: granularity of the index; prompts shorter than this have no affinity.
        capacity: entries of the index (about 150 bytes each).
        slack: requests of extra load that affinity may always cost.
    """

    def __init__(
        self, *, chunk_tokens: int = 64, capacity: int = 100_000, slack: float = 2.0
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._capacity = capacity
        self._slack = slack
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def choose(self, request: RequestInfo, snapshot: Sequence[ReplicaView]) -> str:
        """The replica with the best known prefix within the load bound, else the least loaded."""
        keys = list(self._prefix_keys(request))
        by_id = {replica.replica_id: replica for replica in snapshot}
        chosen = min(snapshot, key=load_of)
        floor = load_of(chosen)
        for depth in range(len(keys), 0, -1):
            home = by_id.get(self._homes.get(keys[depth - 1], ""))
            if home is None:
                continue
            saved = depth * self._chunk_tokens / TOKENS_PER_REQUEST
            if load_of(home) <= floor + self._slack + saved:
                chosen = home
            break
        self._remember(keys, chosen.replica_id)
        return chosen.replica_id

    def forget(self, replica_id: str) -> None:
        """Drop every entry of a replica that is gone."""
        for key in [key for key, home in self._homes.items() if home == replica_id]:
            del self._homes[key]

    def _prefix_keys(self, request: RequestInfo) -> Iterator[bytes]:
        """A chained hash per whole chunk: equal keys mean equal prefixes (16-byte BLAKE2)."""
        digest = hashlib.blake2b(request.cache_salt.encode(), digest_size=16)
        ids = request.prompt_token_ids
        step = self._chunk_tokens
        for end in range(step, len(ids) + 1, step):
            digest.update(array.array("I", ids[end - step : end]).tobytes())
            yield digest.copy().digest()

    def _remember(self, keys: Sequence[bytes], replica_id: str) -> None:
        # Written from the longest prefix to the shortest: the short ones, which more prompts
        # share, are then the most recently used and fall out last.
        for key in reversed(keys):
            self._homes[key] = replica_id
            self._homes.move_to_end(key)
        while len(self._homes) > self._capacity:
            self._homes.popitem(last=False)
