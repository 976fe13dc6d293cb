"""The gateway's part of the plan: ports, limits, and who may call.

Part of the plan: see `plan.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsPlan:
    """What a gateway accepts; over it a request is refused, not queued."""

    max_active_requests: int
    max_prompt_tokens_waiting: int
    max_message_bytes: int
    max_choices: int
    max_prompts_per_request: int
    max_stop_strings: int
    max_logprobs: int
    max_logit_bias: int
    default_timeout_s: float
    stream_buffer_events: int
    max_resumes: int = 2
    """Replicas that a request may lose and go on; 0: it ends with the first."""
    resume_wait_s: float = 0.5
    """Longest time that it waits for another one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsPlan:
    """Files of both ports, PEM, absolute."""

    certificate: str
    key: str
    client_ca: str | None = None
    """Callers have to show a certificate of these authorities; None: nobody is asked for one."""

    @property
    def files(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(file for file in (self.certificate, self.key, self.client_ca) if file)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayPlan:
    """The front: one servicer on a gRPC and an HTTP port, shared by all gateway replicas."""

    host: str
    grpc_port: int
    http_port: int
    replicas: int
    limits: LimitsPlan
    cpus: float = 0.1
    """Logical CPUs that Ray reserves for each gateway replica."""
    api_keys_file: str | None = None
    """Whoever calls has to know a key of this file; None: nobody is asked for one."""
    tls: TlsPlan | None = None
    """None: both ports speak plain text."""
