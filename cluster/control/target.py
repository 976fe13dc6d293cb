"""Which gateway a command talks to, and which model it means."""

from __future__ import annotations

from cluster.base.errors import ConfigError
from cluster.control import run_state
from router.client import PenstockClient


def grpc_target(address: str | None, cluster: str | None) -> str:
    """host:port of a gateway: the given address, or that of a cluster on this machine.

    Raises:
        ConfigError: no address given and not exactly one matching cluster runs here.
    """
    return address if address is not None else run_state.only(cluster).grpc


def model_name(client: PenstockClient, model: str | None, deadline_s: float) -> str:
    """The given model, or the only one that is served.

    Raises:
        ConfigError: none was given and several are served.
    """
    if model is not None:
        return model
    served = [info.name for info in client.models(deadline_s=deadline_s)]
    if len(served) != 1:
        raise ConfigError(
            f"The cluster serves {len(served)} models: {', '.join(served)}.",
            "Say which with --model NAME.",
        )
    return served[0]
