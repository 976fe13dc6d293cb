"""The gateway's part of the plan: ports as written, limits that `auto` left open."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from cluster.base.front_spec import GatewaySpec
from cluster.base.plan import GatewayPlan, LimitsPlan, ModelPlan

WAITING_CONTEXTS = 8
"""Automatic bound on prompt tokens that wait in a gateway, in longest contexts."""


def plan_gateway(spec: GatewaySpec, models: Sequence[ModelPlan], cpus: float) -> GatewayPlan:
    """Decide the gateway's limits from what the models can take.

    `max_active_requests`: all that the replicas can run and queue, shared by the gateways.
    """
    limits = spec.limits
    active, waiting = limits.max_active_requests, limits.max_prompt_tokens_waiting
    if isinstance(active, str):
        capacity = sum(
            model.replicas
            * (
                model.dp_size * model.scheduler.max_running_requests
                + model.scheduler.max_waiting_requests
            )
            for model in models
        )
        active = -(-capacity // spec.replicas)
    if isinstance(waiting, str):
        waiting = WAITING_CONTEXTS * max(model.scheduler.max_context for model in models)
    return GatewayPlan(
        host=spec.host,
        grpc_port=spec.grpc_port,
        http_port=spec.http_port,
        replicas=spec.replicas,
        cpus=cpus,
        limits=LimitsPlan(
            max_active_requests=active,
            max_prompt_tokens_waiting=waiting,
            max_message_bytes=limits.max_message,
            max_choices=limits.max_choices,
            max_prompts_per_request=limits.max_prompts_per_request,
            max_stop_strings=limits.max_stop_strings,
            max_logprobs=limits.max_logprobs,
            max_logit_bias=limits.max_logit_bias,
            default_timeout_s=limits.default_timeout,
            stream_buffer_events=limits.stream_buffer_events,
        ),
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
