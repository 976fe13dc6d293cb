"""The HTTP port of a gateway of this machine, asked without a key, whatever its certificate says.

Only for paths that are open to everybody: nothing secret is sent, nothing is believed but a status.
Standard library only: `pod_leave.py` has to be there at once.
"""

from __future__ import annotations

import ssl
import urllib.request
from typing import Any

from cluster.base import names
from cluster.base.front_plan import GatewayPlan


def url(gateway: GatewayPlan) -> str:
    """Scheme, host and port."""
    scheme = "http" if gateway.tls is None else "https"
    return f"{scheme}://{names.authority(gateway.host, gateway.http_port)}"


def ask(target: str, timeout_s: float) -> Any:
    """The open answer to a GET; raises OSError."""
    context = ssl.create_default_context()
    # Reached by an address that the certificate need not be for.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return urllib.request.urlopen(target, timeout=timeout_s, context=context)


def is_ready(gateway: GatewayPlan) -> bool:
    """Whether it can send requests to a replica of every model."""
    try:
        with ask(f"{url(gateway)}/readyz", timeout_s=1.0) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
