"""What `penstock up` prints into a file: one line for each change of a replica."""

import dataclasses
import io
import re

from rich.console import Console

from cluster.base.plan import ClusterPlan
from cluster.cli.up_display import UpDisplay
from cluster.control.readiness import Snapshot
from replicas.leader.record import LossRecord, ReplicaRecord, ReplicaState


def snapshot(state: ReplicaState, detail: str = "") -> Snapshot:
    record = ReplicaRecord(
        replica_id="0123456789ab", model="demo", epoch="e1", state=state, detail=detail
    )
    return Snapshot(replicas=(record,), gateway_ready=False, waiting_for="")


def test_each_change_is_one_line_with_the_state_and_what_it_is_at():
    said = io.StringIO()
    display = UpDisplay(Console(file=said), ClusterPlan.__new__(ClusterPlan))
    for state, detail in (
        (ReplicaState.STARTING, "worker processes"),
        (ReplicaState.STARTING, "worker processes"),
        (ReplicaState.STARTING, "loading weights"),
        (ReplicaState.READY, ""),
    ):
        display.progress(snapshot(state, detail))
    assert said.getvalue().splitlines() == [
        "  demo 01234567: starting: worker processes",
        "  demo 01234567: starting: loading weights",
        "  demo 01234567: ready",
    ]


def test_what_changes_while_it_serves_has_a_clock_time_and_a_cause():
    said = io.StringIO()
    display = UpDisplay(Console(file=said, width=40), ClusterPlan.__new__(ClusterPlan))
    display.progress(snapshot(ReplicaState.READY))
    display.changed(snapshot(ReplicaState.READY))
    loss = LossRecord(ranks=(1,), nodes=("n",), cause="It died.", num_groups=1, num_groups_whole=2)
    (ready,) = snapshot(ReplicaState.READY).replicas
    degraded = dataclasses.replace(ready, loss=loss)
    display.changed(Snapshot(replicas=(degraded,), gateway_ready=True, waiting_for=""))
    display.changed(snapshot(ReplicaState.FAILED, "rank 0 died (killed by signal 9)"))
    display.changed(Snapshot(replicas=(), gateway_ready=True, waiting_for=""))
    first, *later = said.getvalue().splitlines()
    assert first == "  demo 01234567: ready"
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", line[:8]) for line in later)
    assert [line[9:] for line in later] == [
        "demo 01234567: degraded: serves without rank 1. It died.",
        "demo 01234567: failed: rank 0 died (killed by signal 9)",
        "demo 01234567: gone",
    ]
