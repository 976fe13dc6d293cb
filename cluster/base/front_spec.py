"""The cluster file's sections on the cluster as a whole: its name, Ray's dashboard, the gateway.

Part of the spec: see `spec.py`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cluster.base.quantities import Duration, Size, Whole
from cluster.base.rules import Host, Text
from cluster.base.section import Auto, Section

KIB, MIB = 2**10, 2**20

_PORT = Whole(1, 65535)
_FILE = Text("a file", r".+", 4096)


class IdentitySpec(Section):
    """What the cluster is called, and how its parts leave."""

    name: Annotated[str, Text("small letters, digits and dashes", r"[a-z0-9-]+", 40)] = Field(
        default="penstock",
        description="Name of the cluster, in logs, metrics and state files. "
        "Default: the name of the file without its ending.",
    )
    drain: Annotated[float, Duration(0.1, 24 * 3600)] = Field(
        default=30.0,
        description="Longest time that running requests have to finish on a replica or gateway "
        "that is taken away; it gets no new ones meanwhile.",
    )


class DashboardSpec(Section):
    """Ray's dashboard."""

    port: Annotated[int, _PORT] = Field(
        default=8265, description="Port of the dashboard, on the loopback interface."
    )


class GatewayLimitsSpec(Section):
    """What one gateway accepts and bears; a request over a limit is refused, never queued."""

    max_active_requests: Annotated[int | Auto, Whole(1, 100_000, auto=True)] = Field(
        default="auto",
        description="Requests in the gateway at one time. "
        "auto: what the replicas can run and queue together.",
    )
    max_prompt_tokens_waiting: Annotated[int | Auto, Whole(1, 2**31, auto=True)] = Field(
        default="auto",
        description="Prompt tokens of requests that have no first token yet. "
        "auto: 8 times the longest context served.",
    )
    max_message: Annotated[int, Size(64 * KIB, 64 * MIB)] = Field(
        default=4 * MIB, description="Size of one HTTP body or gRPC message."
    )
    max_choices: Annotated[int, Whole(1, 128)] = Field(
        default=8, description="Choices per request (`n`)."
    )
    max_prompts_per_request: Annotated[int, Whole(1, 4096)] = Field(
        default=64, description="Prompts, inputs or continuations in one request."
    )
    max_stop_strings: Annotated[int, Whole(1, 64)] = Field(
        default=4, description="Stop strings per request."
    )
    max_logprobs: Annotated[int, Whole(0, 100)] = Field(
        default=20, description="Most likely tokens reported per position."
    )
    max_logit_bias: Annotated[int, Whole(0, 10_000)] = Field(
        default=300, description="Entries of `logit_bias`."
    )
    default_timeout: Annotated[float, Duration(1, 24 * 3600)] = Field(
        default=600.0, description="Deadline of a request that sets none."
    )
    stream_buffer_events: Annotated[int, Whole(16, 65_536)] = Field(
        default=1024,
        description="Events kept for a client that reads slowly; past it the stream is closed.",
    )
    max_resumes: Annotated[int, Whole(0, 100)] = Field(
        default=2,
        description="Replicas that a request may lose and still go on with another one of its "
        "model; 0: it ends with the first. Replicas that are taken away do not count.",
    )
    resume_wait: Annotated[float, Duration(0, 600)] = Field(
        default=0.5,
        description="Longest time that a request which lost its replica waits for another one. "
        "With a single replica, the time of its restart lets requests survive that.",
    )


class TlsSpec(Section):
    """Certificates of both ports; the files are PEM, relative to this file, read anew on change."""

    certificate: Annotated[str, _FILE] = Field(
        description="The gateway's certificate, then those between it and its authority "
        "(vLLM's `--ssl-certfile`).",
    )
    key: Annotated[str, _FILE] = Field(
        description="The certificate's private key, not encrypted (`--ssl-keyfile`)."
    )
    client_ca: Annotated[str | None, _FILE] = Field(
        default=None,
        description="Authorities of clients (`--ssl-ca-certs`): with it, whoever calls has to show "
        "a certificate of theirs, but for health checks. Default: nobody is asked for one.",
    )


class GatewaySpec(Section):
    """The front that clients talk to."""

    host: Annotated[str, Host()] = Field(
        default="127.0.0.1",
        description="Address to listen on. Without `api_keys_file` or `tls.client_ca`, any other "
        "address than loopback opens the cluster to everybody who can reach it.",
    )
    grpc_port: Annotated[int, _PORT] = Field(default=50051, description="Port of the gRPC front.")
    http_port: Annotated[int, _PORT] = Field(
        default=8000, description="Port of the OpenAI-compatible HTTP front."
    )
    replicas: Annotated[int, Whole(1, 64)] = Field(
        default=1,
        description="Gateway processes on the node where `penstock up` runs; all share both ports, "
        "and one may die.",
    )
    api_keys_file: Annotated[str | None, _FILE] = Field(
        default=None,
        description="File of the API keys that callers may use (vLLM's `--api-key`), relative to "
        "this file and read anew on change. A line is `KEY` or `NAME: KEY`; `#` begins a comment. "
        "Default: nobody is asked for a key.",
    )
    tls: TlsSpec | None = Field(default=None, description="TLS on both ports. Default: plain text.")
    limits: GatewayLimitsSpec = Field(
        default=GatewayLimitsSpec(), description="What a gateway accepts."
    )
