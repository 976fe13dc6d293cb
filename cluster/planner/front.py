"""The gateway's part of the plan: ports and files as written, limits that `auto` left open."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cluster.base.front_plan import GatewayPlan, LimitsPlan, TlsPlan
from cluster.base.front_spec import GatewaySpec
from cluster.base.plan import ModelPlan

WAITING_CONTEXTS = 8
"""Automatic bound on prompt tokens that wait in a gateway, in longest contexts."""


def plan_gateway(
    spec: GatewaySpec, models: Sequence[ModelPlan], cpus: float, directory: Path
) -> GatewayPlan:
    """Decide the gateway's limits from what the models can take.

    `directory` is what relative paths are relative to. `max_active_requests`: all that the replicas
    can run and queue, shared by the gateways.
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
    api_keys_file, tls = plan_access(spec, directory)
    return GatewayPlan(
        host=spec.host,
        grpc_port=spec.grpc_port,
        http_port=spec.http_port,
        replicas=spec.replicas,
        cpus=cpus,
        api_keys_file=api_keys_file,
        tls=tls,
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
            max_resumes=limits.max_resumes,
            resume_wait_s=limits.resume_wait,
        ),
    )


def plan_access(spec: GatewaySpec, directory: Path) -> tuple[str | None, TlsPlan | None]:
    """The file of API keys and those of TLS, absolute; None where there is none."""

    def absolute(file: str) -> str:
        return str((directory / Path(file).expanduser()).absolute())

    keys, tls = spec.api_keys_file, spec.tls
    return None if keys is None else absolute(keys), None if tls is None else TlsPlan(
        certificate=absolute(tls.certificate),
        key=absolute(tls.key),
        client_ca=None if tls.client_ca is None else absolute(tls.client_ca),
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
