"""What messages and bytes cost between the ranks of a group, as measured or as assumed.

Effective costs: they are taken while all ranks talk at once, so that processors and cards shared by
several ranks are in them already. Torch-free.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCosts:
    """Costs of two kinds of way: between nodes (a node's ranks share it) and inside one."""

    node_delay_s: float = 0.0
    """One way between two nodes, for an empty message."""
    node_message_s: float = 0.0
    """How long one message occupies a node's way out, besides its bytes."""
    node_bytes_per_s: float = float("inf")
    """What a node sends at most."""
    local_delay_s: float = 0.0
    local_message_s: float = 0.0
    """How long one message occupies its sender."""
    local_bytes_per_s: float = float("inf")
    """What a rank sends at most inside its node."""
    row_bytes_per_s: float = float("inf")
    """How fast a rank gathers and adds up rows."""
    call_s: float = 0.0
    """What beginning and ending one collective costs a rank, whoever it talks to."""
    posted_call_s: float = 0.0
    """The same for a hop over slots."""

    own: tuple[tuple[str, float, float], ...] = ()
    """By scheme, what a layer takes besides all that: seconds, and seconds per row of a rank; of
    either sign (see probe_layers.py)."""

    def own_s(self, scheme: str, rows: int) -> float:
        """The time of processors that no message waits for in the simulation."""
        return sum(base_s + rows * row_s for name, base_s, row_s in self.own if name == scheme)

    def to_bytes(self) -> bytes:
        """For the agreement of all ranks; `from_bytes` is its inverse."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> LinkCosts:
        """What `to_bytes` made; trailing blanks are ignored."""
        fields = json.loads(data)
        return cls(**{**fields, "own": tuple(map(tuple, fields["own"]))})
