"""The directory's rules: versions count membership, epochs fence, silence expires."""

from cluster.control.directory_state import DirectoryState
from replicas.leader.record import LoadRecord, ReplicaRecord, ReplicaState


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def record(state: ReplicaState, *, epoch: str = "e1", step: int = 0) -> ReplicaRecord:
    return ReplicaRecord(
        replica_id="r1", model="m", epoch=epoch, state=state, load=LoadRecord(step=step)
    )


def test_version_counts_membership_and_not_load():
    directory = DirectoryState(Clock())
    start = directory.version
    assert directory.report(record(ReplicaState.STARTING))
    assert not directory.report(record(ReplicaState.STARTING, step=5))
    assert directory.records()[0].load.step == 5
    assert directory.report(record(ReplicaState.READY))
    assert directory.version == start + 2


def test_a_replaced_epoch_cannot_speak_for_its_successor():
    directory = DirectoryState(Clock())
    directory.report(record(ReplicaState.READY, epoch="new"))
    assert not directory.report(record(ReplicaState.FAILED, epoch="old"))
    assert not directory.remove("r1", epoch="old")
    assert directory.records()[0].state is ReplicaState.READY


def test_a_restarted_replica_replaces_its_failed_record():
    directory = DirectoryState(Clock())
    directory.report(record(ReplicaState.FAILED, epoch="old"))
    assert directory.report(record(ReplicaState.STARTING, epoch="new"))
    assert directory.records()[0].epoch == "new"


def test_silence_expires():
    clock = Clock()
    directory = DirectoryState(clock, expiry_s=10.0)
    directory.report(record(ReplicaState.READY))
    clock.now_s += 9.0
    assert not directory.expire()
    clock.now_s += 2.0
    before = directory.version
    assert directory.expire()
    assert directory.records() == []
    assert directory.version == before + 1


def test_goodbye_removes():
    directory = DirectoryState(Clock())
    directory.report(record(ReplicaState.READY))
    assert directory.remove("r1", epoch="e1")
    assert directory.records() == []


def test_a_model_that_was_taken_away_leaves_no_record():
    directory = DirectoryState(Clock())
    directory.report(record(ReplicaState.FAILED))
    before = directory.version
    assert not directory.forget_model("other")
    assert directory.forget_model("m")
    assert directory.records() == []
    assert directory.version == before + 1
