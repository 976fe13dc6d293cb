"""Budgets refuse with the sum that does not work out."""

from __future__ import annotations

import pytest

from cluster.base.errors import ConfigError
from offload.budget import Budget, BudgetError


def test_parts_add_up_and_the_refusal_shows_the_sum() -> None:
    budget = Budget("offload.device_memory", 1000)
    budget.reserve("ring", 400)
    budget.reserve("cache", 500)
    with pytest.raises(BudgetError, match=r"1000B and 1.07KiB are needed: ring 400B") as caught:
        budget.reserve("workspace", 200)
    assert isinstance(caught.value, ConfigError)
    assert caught.value.param == "offload.device_memory"
    assert budget.reserved_bytes == 900
    budget.release("ring")
    budget.reserve("workspace", 200)
    assert budget.parts == {"cache": 500, "workspace": 200}
