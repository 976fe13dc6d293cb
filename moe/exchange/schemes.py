"""The ways of moving tokens between ranks, by name. Torch-free."""

from __future__ import annotations

import enum


class Scheme(enum.StrEnum):
    """How an expert-parallel group of several ranks exchanges tokens."""

    FLAT = "flat"
    HIERARCHICAL = "hierarchical"
    PREPOSTED = "preposted"


class Way(enum.StrEnum):
    """Whom a rank exchanges with."""

    WORLD = "world"
    """Everybody."""
    NODE = "node"
    """The ranks of its node."""
    RAIL = "rail"
    """A rank of every node."""


DEFAULT_SLOT_ROWS = 64
"""Rows per peer that `preposted` sends without a second round."""
DEFAULT_PROBE_S = 1.0
"""What measuring the links may take."""
