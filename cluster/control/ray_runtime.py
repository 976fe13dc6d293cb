"""The Ray runtime under a cluster: started here and owned, or joined and left as found.

A runtime that we start belongs to this process: it listens for nobody else, and ends with
`leave()`. Ray's token authentication stays as Ray (or the user's RAY_AUTH_MODE) sets it: on.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray._private.worker import BaseContext

from cluster.base import env
from cluster.base.errors import ConfigError, UnavailableError
from cluster.base.names import NAMESPACE

_logger = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 100 * 1024 * 1024
_LOOPBACK = "127.0.0.1"
_PROBE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RayRuntime:
    """A connected Ray runtime."""

    address: str
    dashboard_url: str
    session_dir: str
    owned: bool
    token_auth: bool
    """Whether the dashboard asks for Ray's token."""
    node_resource: str
    """Ray's resource that only this node has."""


def start_local(
    *, dashboard_port: int, num_cpus: int | None = None, memory_bytes: int | None = None
) -> RayRuntime:
    """Start a one-node runtime on this machine and connect to it.

    Our data never goes through Ray's object store, so it is kept small.

    Args:
        memory_bytes: what replicas may reserve; None: what is free now, as Ray finds it.

    Raises:
        UnavailableError: Ray did not start; carries Ray's reason.
    """
    env.set_ray_defaults()
    _quieten()
    try:
        context = ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            dashboard_host=_LOOPBACK,
            dashboard_port=dashboard_port,
            object_store_memory=_OBJECT_STORE_BYTES,
            _memory=memory_bytes,
            namespace=NAMESPACE,
            configure_logging=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (RuntimeError, ConnectionError, OSError, ValueError, TimeoutError) as error:
        raise UnavailableError(
            f"Ray did not start on this machine: {error}.",
            "See the newest session under /tmp/ray for its logs.",
        ) from error
    return _runtime(context, owned=True)


def join(address: str) -> RayRuntime:
    """Connect to a running Ray cluster ("auto" finds this machine's).

    Raises:
        ConfigError: nothing answers at `address`, or it refuses our token.
    """
    env.set_ray_defaults()
    _quieten()
    try:
        _probe(address)
        context = ray.init(
            address=address,
            namespace=NAMESPACE,
            configure_logging=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (RuntimeError, ConnectionError, OSError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"Cannot join the Ray cluster at {address!r}: {error}.",
            "Start it with `ray start --head`, or leave --address out to start one here; if it "
            "wants another token or none, set RAY_AUTH_TOKEN or RAY_AUTH_MODE.",
            param="--address",
        ) from error
    return _runtime(context, owned=False)


def leave() -> None:
    """Disconnect; a runtime that `start_local` made ends here, with all its processes."""
    ray.shutdown()


def _runtime(context: BaseContext, *, owned: bool) -> RayRuntime:
    info: dict[str, Any] = context.address_info  # type: ignore[attr-defined]
    return RayRuntime(
        address=info["gcs_address"],
        dashboard_url=f"http://{context.dashboard_url}" if context.dashboard_url else "",
        session_dir=info["session_dir"],
        owned=owned,
        token_auth=env.ray_token_auth(),
        node_resource=_node_resource(),
    )


def _node_resource() -> str:
    """The `node:ADDRESS` of the node that this driver is on."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    return f"node:{node['NodeManagerAddress']}"


def _probe(address: str) -> None:
    """Find out within seconds that nobody listens; Ray itself would try for over a minute.

    Raises:
        OSError: nothing answers at host:port. Other forms of address are left to Ray.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()


def _quieten() -> None:
    """Keep Ray's own narration off the terminal; its warnings stay.

    What a raylet reports of dead workers goes to the log, at debug level: leaders and gateways say
    what was lost and why, and `up` shows it. Ray has no switch for what it prints there.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    ray_worker.print_to_stdstream = _log_of_ray


def _log_of_ray(data: dict[str, Any], ignore_prefix: bool) -> None:
    for line in data["lines"]:
        _logger.debug("ray: %s", line, extra={"source": data.get("pid")})
