"""A Ray cluster that others use is asked for its free room before anything waits for it."""

import dataclasses
from pathlib import Path

import pytest

from cluster.base.errors import UnavailableError
from cluster.base.plan import MemoryPlan
from cluster.control.room import refuse_shortage
from tests.support.lockstep_ranks import model_plan

GIB = 1 << 30
MEMORY = MemoryPlan(
    weights_bytes=2 * GIB, kv_bytes=GIB, workspace_bytes=GIB, available_bytes=64 * GIB
)
MODEL = dataclasses.replace(model_plan(Path("/m"), dp=2, tp=2), memory=MEMORY)
NEED = 3 * 4 * 4 * GIB


NEEDS = [(MODEL, 3), (dataclasses.replace(MODEL, name="other"), 1)]
TOTAL = {"memory": 128.0 * GIB, "CPU": 64.0}


def test_as_much_as_is_free_is_fine():
    refuse_shortage(NEEDS, {"memory": NEED + NEED // 3, "CPU": 64.0}, TOTAL)
    refuse_shortage([], {}, TOTAL)


def test_cpus_count_too():
    with pytest.raises(UnavailableError) as refused:
        refuse_shortage(NEEDS, {"memory": TOTAL["memory"], "CPU": 4.0}, TOTAL)
    assert "but 4 of the Ray cluster's 64 are free" in refused.value.cause
    assert "resources.cpus_per_rank" in refused.value.remedy


def test_what_does_not_fit_is_refused_with_the_arithmetic_and_a_remedy():
    with pytest.raises(UnavailableError) as refused:
        refuse_shortage(NEEDS, {"memory": NEED + NEED // 3 - 1, "CPU": 64.0}, TOTAL)
    assert "reserve 64GiB of memory (m 48GiB, other 16GiB)" in refused.value.cause
    assert "of the Ray cluster's 128GiB are free" in refused.value.cause
    assert "ray status" in refused.value.remedy
