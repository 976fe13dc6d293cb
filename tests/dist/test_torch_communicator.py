"""Collectives between real gloo processes: values, equal bits, lost and late peers."""

from __future__ import annotations

import pytest

from cluster.base.errors import CollectiveTimeoutError, ConfigError, InternalError
from cluster.dist.rendezvous import Rendezvous, listen, pick_port
from cluster.dist.torch_communicator import TorchCommunicator
from tests.support.rank_processes import run_ranks, values

SCENARIOS = "tests.support.rank_scenarios"


def test_collectives_of_three_ranks() -> None:
    answers = values(run_ranks(f"{SCENARIOS}:collectives", 3))
    own = [[[0, 1, 2], [3, 4, 5]], [[100, 101, 102], [103, 104, 105]]]
    own.append([[200, 201, 202], [203, 204, 205]])
    for answer in answers:
        assert answer["all_reduce"] == [6, 6]
        assert answer["all_reduce_strided"] == [[0, 12, 24], [6, 18, 30]]
        assert answer["all_gather_0"] == own[0] + own[1] + own[2]
        assert answer["all_gather_1"] == [own[0][i] + own[1][i] + own[2][i] for i in range(2)]
        assert answer["all_gather_last"] == answer["all_gather_1"]
        assert answer["contiguous"]
        assert answer["broadcast"] == [1, 1, 1]
        assert answer["noise"] == answers[0]["noise"], "ranks must agree to the bit"


def test_a_dead_peer_is_noticed_at_once() -> None:
    *survivors, dead = run_ranks(f"{SCENARIOS}:one_rank_dies", 3, timeout_s=30.0)
    assert dead.exit_code == 7
    for survivor in survivors:
        assert survivor.error is not None
        assert survivor.error["code"] == "worker_died"
        assert survivor.duration_s < 10


def test_a_late_peer_is_a_timeout() -> None:
    *waiting, _ = run_ranks(f"{SCENARIOS}:one_rank_sleeps", 2, timeout_s=1.0, seconds=4.0)
    for rank in waiting:
        assert rank.error is not None
        assert rank.error["code"] == "collective_timeout"
        assert 0.9 < rank.duration_s < 3.5


def _alone(**changes: object) -> TorchCommunicator:
    place = Rendezvous(host="127.0.0.1", port=pick_port("127.0.0.1"), connect_timeout_s=1.0)
    arguments = {"rank": 0, "size": 1, "backend": "gloo", "rendezvous": place, "timeout_s": 5.0}
    return TorchCommunicator(**(arguments | changes))  # type: ignore[arg-type]


def test_a_group_of_one_and_use_after_close() -> None:
    communicator = _alone()
    communicator.barrier()
    communicator.close()
    with pytest.raises(InternalError, match="left its group"):
        communicator.barrier()


@pytest.mark.parametrize("size", [2])
def test_peers_that_never_come_are_a_timeout(size: int) -> None:
    with pytest.raises(CollectiveTimeoutError):
        _alone(size=size)


def test_nobody_listens() -> None:
    with pytest.raises(CollectiveTimeoutError):
        _alone(rank=1, size=2)


def test_a_taken_port_is_told() -> None:
    port = pick_port("127.0.0.1")
    with listen("127.0.0.1", port), pytest.raises(InternalError, match="in use"):
        _alone(rendezvous=Rendezvous(host="127.0.0.1", port=port))


@pytest.mark.parametrize("wrong", [{"backend": "mpi"}, {"rank": 1}, {"rank": -1}])
def test_arguments_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        _alone(**wrong)
