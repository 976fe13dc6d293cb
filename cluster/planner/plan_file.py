"""A cluster file -> plan in one call, with the planner's refusals pinned to lines of the file."""

from __future__ import annotations

from cluster.base.errors import ConfigError
from cluster.base.load import ClusterFile
from cluster.base.plan import ClusterPlan
from cluster.base.problems import ClusterFileError, Problem
from cluster.dist.topology import Topology
from cluster.planner.hub import Hub
from cluster.planner.planner import make_plan
from cluster.planner.text_check import check_texts


def plan_file(file: ClusterFile, topology: Topology, hub: Hub | None = None) -> ClusterPlan:
    """Decide everything that `file` left open.

    Raises:
        ClusterFileError: what `make_plan` or `check_texts` refused, with its line and key path.
    """
    try:
        plan = make_plan(file.spec, topology, directory=file.directory, hub=hub)
        check_texts(plan, file.spec)
        return plan
    except ConfigError as error:
        param = error.param or ""
        problem = Problem(
            file=str(file.path),
            line=file.line_of(param) if param else 0,
            param=param,
            message=error.cause,
        )
        raise ClusterFileError([problem], remedy=error.remedy) from error
