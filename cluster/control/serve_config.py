"""Plan -> Serve's own configuration (`ServeDeploySchema`), for whoever deploys by files. Pure.

The applications are those that `penstock up` deploys; `serve_app.py` builds them from this.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from cluster.base import names
from cluster.base.front_plan import GatewayPlan
from cluster.base.plan import ClusterPlan, ModelPlan
from cluster.control.deployments import leader_settings, upkeep

GROUP_LABEL = "penstock.io/group"
"""Ray node label that says which processes a node is for."""
GATEWAY_GROUP = "gateway"
_ENTRY = "cluster.control.serve_app"


def serve_config(plan: ClusterPlan, groups: dict[str, str]) -> dict[str, Any]:
    """The configuration.

    Args:
        groups: the value of `GROUP_LABEL` for each model.
    """
    engines = [_engine(plan, model, groups[model.name]) for model in plan.models]
    return {"proxy_location": "Disabled", "applications": [*engines, _gateway(plan)]}


def _engine(plan: ClusterPlan, model: ModelPlan, group: str) -> dict[str, Any]:
    built_from = dataclasses.replace(
        model, replicas=1, tool_call_parser="auto", overflow=None, reasons={}, nodes=()
    )
    return {
        "name": names.engine_app(plan.name, model.name),
        "route_prefix": None,
        "import_path": f"{_ENTRY}:engine",
        "args": {"cluster": plan.name, "model": _plain(built_from), "group": group},
        "deployments": [
            {
                "name": "leader",
                "num_replicas": model.replicas,
                "user_config": leader_settings(plan.drain_s),
                **upkeep(plan.drain_s),
            }
        ],
    }


def _gateway(plan: ClusterPlan) -> dict[str, Any]:
    front = dataclasses.replace(
        plan, models=(), warnings=(), drain_s=0.0, gateway=_fixed(plan.gateway)
    )
    models = tuple(dataclasses.replace(model, reasons={}, nodes=()) for model in plan.models)
    return {
        "name": names.gateway_app(plan.name),
        "route_prefix": None,
        "import_path": f"{_ENTRY}:gateway",
        "args": {"front": _plain(front), "group": GATEWAY_GROUP},
        "deployments": [
            {
                "name": "gateway",
                "num_replicas": plan.gateway.replicas,
                "user_config": _plain(dataclasses.replace(plan, models=models, warnings=())),
                **upkeep(plan.drain_s),
            }
        ],
    }


def _fixed(gateway: GatewayPlan) -> GatewayPlan:
    """What a gateway keeps for life; the rest comes with `user_config` before it is ready."""
    limits = dataclasses.replace(
        gateway.limits, max_active_requests=1, max_prompt_tokens_waiting=1, default_timeout_s=1.0
    )
    return dataclasses.replace(gateway, replicas=1, limits=limits)


def _plain(plan: Any) -> dict[str, Any]:
    """A plan as plain data for `from_json`; what is as the plan's classes have it is left out."""
    plain: dict[str, Any] = json.loads(json.dumps(_spoken(plan)))
    return plain


def _spoken(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return [_spoken(item) for item in value] if isinstance(value, tuple) else value
    held = {field.name: (getattr(value, field.name), field) for field in dataclasses.fields(value)}
    return {name: _spoken(item) for name, (item, field) in held.items() if item != _default(field)}


def _default(field: dataclasses.Field[Any]) -> Any:
    """What a field is when nothing is said; `MISSING`, which nothing equals, where it has to be."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
