"""What machines a cluster has, as plain data: nodes, their accelerators and the links between them.

Torch-free and Ray-free: the control plane fills it from whatever it can see, the planner reads it.
It describes capacity only; what is free at this moment is somebody else's measurement.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator of a node."""

    index: int
    kind: str
    """Vendor name of the model, as the driver reports it."""
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A measured or declared connection between two nodes (or within one, `source == target`)."""

    source: str
    target: str
    bandwidth_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine that can run replicas."""

    node_id: str
    host: str
    """Address its peers reach it under."""
    cores: int
    memory_bytes: int
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """All nodes, in a stable order, and the links that are known."""

    nodes: tuple[Node, ...]
    links: tuple[Link, ...] = ()

    @property
    def cores(self) -> int:
        """CPU cores of all nodes."""
        return sum(node.cores for node in self.nodes)

    @property
    def devices(self) -> tuple[tuple[Node, Device], ...]:
        """Every accelerator with its node, in node order."""
        return tuple((node, device) for node in self.nodes for device in node.devices)

    def link(self, source: str, target: str) -> Link | None:
        """The link between two nodes, in either direction; None when nothing is known."""
        for link in self.links:
            if {link.source, link.target} == {source, target}:
                return link
        return None
