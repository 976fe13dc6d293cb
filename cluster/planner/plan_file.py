"""A cluster file -> plan in one call, with the planner's refusals pinned to lines of the file."""

from __future__ import annotations

from cluster.base.load import ClusterFile, pinned_to_lines
from cluster.base.plan import ClusterPlan
from cluster.dist.topology import Topology
from cluster.planner.hub import Hub
from cluster.planner.planner import make_plan
from cluster.planner.text_check import check_texts


def plan_file(file: ClusterFile, topology: Topology, hub: Hub | None = None) -> ClusterPlan:
    """Decide everything that `file` left open.

    Raises:
        ClusterFileError: what `make_plan` or `check_texts` refused, with its line and key path.
    """
    with pinned_to_lines(file):
        plan = make_plan(file.spec, topology, directory=file.directory, hub=hub)
        check_texts(plan, file.spec)
        return plan
