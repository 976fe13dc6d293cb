"""Entry points for Serve's own configuration files, such as a RayService carries.

    import_path: cluster.control.serve_app:engine      args: {cluster, model, group}
    import_path: cluster.control.serve_app:gateway     args: {front}

`serve_config.py` writes these files. Serve restarts an application whose arguments differ, so they
hold what replicas are built from and nothing else; how many there are and what may change while
they run is in `num_replicas` and `user_config`, which Serve applies in place.
"""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from cluster.base.plan import ClusterPlan, ModelPlan, from_json
from cluster.control import deployments
from cluster.control.directory_actor import start_directory
from cluster.control.serve_config import GROUP_LABEL

_DRAIN_S = 30.0
"""Until the deployment's own `user_config` says otherwise, which is before it is ready."""


def engine(args: dict[str, Any]) -> Application:
    """The application of one model.

    Args:
        args: `cluster`; `model`, JSON of a `ModelPlan`; `group`, the label of nodes to run on.
    """
    model = from_json(ModelPlan, args["model"])
    start_directory(args["cluster"])
    deployment = deployments.leader_deployment(
        model,
        _DRAIN_S,
        placement_group_bundle_label_selector=[{GROUP_LABEL: args["group"]}],
    )
    app: Application = deployments.bind_leader(deployment, model, args["cluster"], host="")
    return app


def gateway(args: dict[str, Any]) -> Application:
    """The application of the gateways.

    Args:
        args: `front`, JSON of a `ClusterPlan` without models; `group`, the label of its nodes.
    """
    front = from_json(ClusterPlan, args["front"])
    start_directory(front.name)
    where = {"label_selector": {GROUP_LABEL: args["group"]}}
    app: Application = deployments.gateway_deployment(front, where).bind(args["front"], "")
    return app
