"""What `penstock up` prints into a file: one line for each change of a replica."""

import io

from rich.console import Console

from cluster.base.plan import ClusterPlan
from cluster.cli.up_display import UpDisplay
from cluster.control.lifecycle import Snapshot
from replicas.leader.record import ReplicaRecord, ReplicaState


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
