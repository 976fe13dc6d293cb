"""What both fronts say of the place where a generation runs: names and values as text."""

from __future__ import annotations

from collections.abc import Iterator

from router.api import Tier


def tier_fields(tier: Tier | None) -> Iterator[tuple[str, str]]:
    """(name, value) of what is known; the fronts prefix the names in their own way."""
    if tier is None:
        return
    yield "served-by", tier.model
    yield "engine", tier.engine
    if tier.overflow:
        yield "overflow", tier.overflow
    if tier.tokens_per_s:
        yield "predicted-tokens-per-s", f"{tier.tokens_per_s:.3g}"
