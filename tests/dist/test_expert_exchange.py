"""Exchanges between real gloo processes: equal results, and a name for whoever fails."""

from __future__ import annotations

import pytest

from tests.support.rank_processes import run_ranks, values

RANKS = "tests.support.exchange_ranks"


@pytest.mark.parametrize(
    ("nodes", "rows", "without_memory"),
    [
        (["a", "a", "b", "b", "b"], [0, 0, 11, 0, 2], None),
        (["a", "a", "a"], [3, 0, 6], None),
        (["a", "a", "a"], [3, 0, 6], 1),
    ],
    ids=["2+3", "1x3", "1x3, one cannot share memory"],
)
def test_gloo_ranks_give_the_one_process_result(nodes, rows, without_memory):
    answers = values(
        run_ranks(
            f"{RANKS}:all_schemes",
            len(nodes),
            node_of_W=nodes,
            rows=rows,
            without_memory=without_memory,
        )
    )
    for answer in answers:
        wrong = [case for case, same in answer["equal"].items() if not same]
        assert not wrong
        assert answer["header"] == [[rank] * 3 for rank in range(len(nodes))]
        assert answer["memory"] == (without_memory is None)
    # Only slots overflow, and inside a node there are none if it shares memory.
    has_slots = len(set(nodes)) > 1 or without_memory is not None
    assert (sum(answer["overflows"] for answer in answers) > 0) == has_slots


@pytest.mark.parametrize(
    ("scheme", "fault"),
    [("flat", "exit"), ("preposted", "exit"), ("hierarchical", "stop"), ("preposted", "stop")],
)
def test_a_lost_rank_is_named_within_five_seconds(scheme, fault):
    results = run_ranks(
        f"{RANKS}:layers_until_failure",
        4,
        deadline_s=30.0,
        node_of_W=["a", "a", "b", "b"],
        scheme=scheme,
        victim=2,
        fault=fault,
    )
    for rank in (0, 1, 3):
        answer = results[rank].value
        assert answer is not None, results[rank].log
        assert answer["code"] == "worker_died"
        assert "rank 2 (node b)" in answer["cause"].lower()
        # Its rows have left, so its rail may be further: whoever finds out first says where it was.
        assert "layer 3 dispatch" in answer["cause"] or "layer 3 combine" in answer["cause"]
        assert answer["after_s"] < (2.0 if fault == "exit" else 5.0)
        assert answer["stays"]


def test_a_late_rank_is_named_at_the_deadline():
    results = run_ranks(
        f"{RANKS}:layers_until_failure",
        4,
        deadline_s=30.0,
        node_of_W=["a", "a", "b", "b"],
        scheme="hierarchical",
        victim=1,
        fault="late",
        patience_s=2.5,
    )
    for rank in (0, 2, 3):
        answer = results[rank].value
        assert answer["code"] == "collective_timeout"
        assert "for rank 1 (node a): it has been computing for" in answer["cause"]
        assert 2.4 < answer["after_s"] < 4.0
