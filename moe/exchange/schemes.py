"""The ways of moving tokens between ranks, by name. Torch-free."""

from __future__ import annotations

import enum


class Scheme(enum.StrEnum):
    """How an expert-parallel group of several ranks exchanges tokens."""

    FLAT = "flat"
    HIERARCHICAL = "hierarchical"
    PREPOSTED = "preposted"


DEFAULT_SLOT_ROWS = 64
"""Rows per peer that `preposted` sends without a second round."""
