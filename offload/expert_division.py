"""Which experts in host memory the host computes, which are fetched: a latency model. Torch-free.

An expert that few rows visit is read once either way: over the link to the device, or by the host's
cores out of its own memory, which is closer; then only the rows travel (Kamahori et al., Fiddler,
arXiv 2402.07033). Link and cores work side by side, so the experts of a layer that are in no slot
are divided between them such that the later of the two is done as early as possible.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.base.plan import HostExpertsPlan

_WIDE_BYTES = 4
"""An expert's output is fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWork:
    """One expert of a layer, and the rows that visit it."""

    unit: str
    num_bytes: int
    """Of its record."""
    num_weights: int
    """That are multiplied with every row."""
    row_bytes: int
    """That travel for one row, to the host and back."""
    rows: int = 0


def fetch_s(work: ExpertWork, costs: HostExpertsPlan) -> float:
    """Seconds until the device has the expert."""
    return work.num_bytes / costs.link_bytes_per_s


def compute_s(work: ExpertWork, costs: HostExpertsPlan) -> float:
    """Seconds until the device has what the host made of the expert's rows."""
    multiply = 2 * work.num_weights * work.rows / costs.host_flops_per_s
    read = work.num_bytes / costs.host_bytes_per_s
    return multiply + read + work.rows * work.row_bytes / costs.link_bytes_per_s + costs.call_s


def divide(works: list[ExpertWork], costs: HostExpertsPlan) -> list[str]:
    """The units for the host to compute; the others are fetched meanwhile.

    Of experts of equal size those with fewest rows, as many as end soonest: exact, as all fetches
    take the same and only the sums count.
    """
    order = sorted(works, key=lambda work: compute_s(work, costs))
    fetching_s, computing_s = sum(fetch_s(work, costs) for work in order), 0.0
    best, best_s = 0, fetching_s
    for count, work in enumerate(order, start=1):
        computing_s += compute_s(work, costs)
        fetching_s -= fetch_s(work, costs)
        if max(computing_s, fetching_s) < best_s:
            best, best_s = count, max(computing_s, fetching_s)
    return [work.unit for work in order[:best]]


def row_bytes(model_dim: int, item_bytes: int) -> int:
    """Bytes that travel for one row: its hidden state to the host, the expert's output back."""
    return model_dim * (item_bytes + _WIDE_BYTES)


def num_for_host(count: int, work: ExpertWork, costs: HostExpertsPlan) -> int:
    """Of `count` experts as `work`, how many `divide` leaves to the host; closed form."""
    fetching_s, computing_s = fetch_s(work, costs), compute_s(work, costs)
    even = int(count * fetching_s / (fetching_s + computing_s))
    return min(
        (even, min(count, even + 1)),
        key=lambda host: max(host * computing_s, (count - host) * fetching_s),
    )
