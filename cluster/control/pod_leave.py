"""What a gateway's pod does before it is told to end: waits until its requests have ended.

    python -m cluster.control.pod_leave METRICS_URL SECONDS

By then Kubernetes sends it no new connections. Imports next to nothing: it has to be there at once.
"""

from __future__ import annotations

import sys
import time

from cluster.control import own_gateway

_GAUGE = "penstock_active_requests{"
_LOOK_S = 0.5
_SETTLE_S = 3.0
"""Until every node has taken the pod out of its tables."""


def num_active(metrics: str) -> int:
    """Requests in progress, from the text of /metrics."""
    values = (line.rpartition(" ")[2] for line in metrics.splitlines() if line.startswith(_GAUGE))
    return int(sum(map(float, values)))


def wait_idle(url: str, timeout_s: float, settle_s: float = _SETTLE_S) -> bool:
    """Wait until nothing runs, `settle_s` at least; False when that took too long.

    A gateway that does not answer has nothing to wait for.
    """
    deadline_s = time.monotonic() + timeout_s
    time.sleep(min(settle_s, timeout_s))
    while time.monotonic() < deadline_s:
        try:
            with own_gateway.ask(url, timeout_s=2.0) as answer:
                if num_active(answer.read().decode()) == 0:
                    return True
        except OSError:
            return True
        time.sleep(_LOOK_S)
    return False


if __name__ == "__main__":
    sys.exit(0 if wait_idle(sys.argv[1], float(sys.argv[2])) else 1)
