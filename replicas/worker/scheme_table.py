"""Which exchange suits how many rows: measured and tabulated by the ranks, looked up by the leader.

The leader names the exchange of each step and loads no torch, so the ranks give it the answers for
every size beforehand.
"""

from __future__ import annotations

from moe.exchange.choose import choose
from moe.exchange.exchanges import Exchanges
from moe.exchange.link_costs import LinkCosts

SchemeRow = tuple[int, str, str]
"""Up to this many rows per rank: the scheme, and why."""


def scheme_table(
    wanted: str, exchanges: Exchanges, max_rows: int, costs: LinkCosts | None
) -> list[SchemeRow]:
    """The exchange for every number of rows, by powers of two; the same on all ranks.

    Args:
        wanted: a scheme, or `auto`: the fastest by `costs`.
        max_rows: most rows that one rank dispatches in a step.
        costs: of the links; None: not known, and with `auto` there is no table.
    """
    if wanted != "auto":
        return [(max_rows, wanted, "asked for")]
    if costs is None:
        return []
    sizes = [1 << power for power in range((max_rows - 1).bit_length() + 1)]
    table = []
    for rows in sizes:
        choice = choose(
            rows, exchanges.topology, costs, exchanges.format, slot_rows=exchanges.slot_rows
        )
        table.append((rows, str(choice.scheme), choice.reason))
    return table
