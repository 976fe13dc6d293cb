"""The plan of an edited cluster file, for a cluster that runs: what runs is decided already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from cluster.base.load import ClusterFile
from cluster.base.plan import ClusterPlan, ModelPlan
from cluster.dist.topology import Topology
from cluster.planner.front import plan_gateway
from cluster.planner.hub import Hub
from cluster.planner.pinned import pin
from cluster.planner.plan_file import plan_file


def next_plan(
    running: ClusterPlan, edited: ClusterFile, topology: Topology, hub: Hub
) -> ClusterPlan:
    """Plan new models into what is left; of running ones only what can change does.

    Args:
        edited: already compared with the file of `running` (`changes.compare`).
        topology: what `running` was planned for.

    Raises:
        ClusterFileError: a model cannot be planned, or the replicas do not fit.
    """
    beside = dataclasses.replace(edited, spec=pin(edited.spec, running))
    planned = plan_file(beside, topology, hub)
    decided = {model.name: model for model in running.models}
    models = tuple(
        _follow(decided[model.name], model) if model.name in decided else model
        for model in planned.models
    )
    return dataclasses.replace(
        planned,
        models=models,
        gateway=plan_gateway(edited.spec.gateway, models, running.gateway.cpus, edited.directory),
        warnings=(
            *(text for text in planned.warnings if text not in running.warnings),
            *_crowding(running.models, models, topology.cores),
        ),
    )


def _follow(running: ModelPlan, planned: ModelPlan) -> ModelPlan:
    return dataclasses.replace(
        running,
        replicas=planned.replicas,
        overflow=planned.overflow,
        tool_call_parser=planned.tool_call_parser,
        nodes=planned.nodes,
    )


def _crowding(before: Sequence[ModelPlan], after: Sequence[ModelPlan], cores: int) -> Iterator[str]:
    """Replicas that run keep their threads, so others beside them can be too many for the cores."""
    threads = _num_threads(after)
    if threads > cores and threads > _num_threads(before):
        yield (
            f"{threads} compute threads will share {cores} cores. A replica keeps the threads it "
            "was planned with; resources.threads_per_rank sets them for the next start."
        )


def _num_threads(models: Sequence[ModelPlan]) -> int:
    return sum(
        model.replicas * model.num_ranks * model.num_threads
        for model in models
        if model.device == "cpu"
    )
