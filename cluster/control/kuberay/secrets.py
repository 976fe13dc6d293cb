"""Keys and certificates of gateways in pods: Secrets that the user makes, mounted as files.

Only their names and paths are rendered. Kubernetes puts a changed Secret into the running pod, and
the gateway follows its files, so a rotation needs no new pod.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cluster.base.front_plan import GatewayPlan, TlsPlan
from cluster.base.plan import ClusterPlan

_DIR = "/etc/penstock"
_OWNER_AND_GROUP_READ = 0o440
Json = dict[str, Any]


def in_pod(gateway: GatewayPlan) -> GatewayPlan:
    """The gateway with the paths that its files have in pods."""
    keys, tls = gateway.api_keys_file, gateway.tls
    return dataclasses.replace(
        gateway,
        api_keys_file=None if keys is None else f"{_DIR}/api-keys/api-keys",
        tls=None
        if tls is None
        else TlsPlan(
            certificate=f"{_DIR}/tls/tls.crt",
            key=f"{_DIR}/tls/tls.key",
            client_ca=None if tls.client_ca is None else f"{_DIR}/client-ca/ca.crt",
        ),
    )


def secret_volumes(plan: ClusterPlan) -> list[tuple[Json, str]]:
    """Volumes of the Secrets that gateways need, and where they are mounted."""
    gateway = plan.gateway
    wanted = {
        "api-keys": gateway.api_keys_file is not None,
        "tls": gateway.tls is not None,
        "client-ca": gateway.tls is not None and gateway.tls.client_ca is not None,
    }
    return [
        (
            {
                "name": name,
                "secret": {
                    "secretName": f"{plan.name}-{name}",
                    "defaultMode": _OWNER_AND_GROUP_READ,
                },
            },
            f"{_DIR}/{name}",
        )
        for name, is_wanted in wanted.items()
        if is_wanted
    ]
