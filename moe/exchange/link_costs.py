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

    layers: tuple[tuple[str, float, float], ...] = ()
    """By scheme, how long a layer takes: seconds, and seconds per second of virtual time (see
    layer_costs.py)."""
    doubt: float = 0.1
    """Expected times that differ by less than this share cannot be told apart: the fewer layers a
    probe has timed, the more."""

    def layer_s(self, scheme: str, virtual_s: float) -> float:
        """How long a layer takes that needs `virtual_s` by the other costs."""
        for name, base_s, scale in self.layers:
            if name == scheme:
                # Far from the rows of the probe its line must not outweigh what the links need.
                return max(scale * virtual_s / 4, base_s + scale * virtual_s)
        return virtual_s

    def to_bytes(self) -> bytes:
        """For the agreement of all ranks; `from_bytes` is its inverse."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> LinkCosts:
        """What `to_bytes` made; trailing blanks are ignored."""
        fields = json.loads(data)
        return cls(**{**fields, "layers": tuple(map(tuple, fields["layers"]))})
