"""A Ray cluster that others use is asked for its free memory before anything waits for it."""

import dataclasses
from pathlib import Path

import pytest

from cluster.base.errors import UnavailableError
from cluster.base.plan import ClusterPlan, MemoryPlan
from cluster.control.room import refuse_shortage
from tests.support.lockstep_ranks import model_plan

GIB = 1 << 30
MEMORY = MemoryPlan(
    weights_bytes=2 * GIB, kv_bytes=GIB, workspace_bytes=GIB, available_bytes=64 * GIB
)
MODEL = dataclasses.replace(model_plan(Path("/m"), dp=2, tp=2), replicas=3, memory=MEMORY)
NEED = 3 * 4 * 4 * GIB


def plan() -> ClusterPlan:
    other = dataclasses.replace(MODEL, name="other", replicas=1)
    return ClusterPlan(name="c", gateway=None, models=(MODEL, other), dashboard_port=0)


def test_as_much_as_is_free_is_fine():
    refuse_shortage(plan(), NEED + NEED // 3, 128 * GIB)


def test_what_does_not_fit_is_refused_with_the_arithmetic_and_a_remedy():
    with pytest.raises(UnavailableError) as refused:
        refuse_shortage(plan(), NEED + NEED // 3 - 1, 128 * GIB)
    assert "reserve 64GiB of memory (m 48GiB, other 16GiB)" in refused.value.cause
    assert "of the Ray cluster's 128GiB are free" in refused.value.cause
    assert "ray status" in refused.value.remedy
