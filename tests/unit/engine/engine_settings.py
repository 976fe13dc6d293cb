"""The hypothesis settings of the engine tests: bounded, and the same on every run in CI."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings


def engine_settings(**overrides: int) -> settings:
    return settings(
        deadline=None,
        derandomize="CI" in os.environ,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        **overrides,
    )
