"""When the leader has links measured anew, and that ranks which differ are refused."""

from __future__ import annotations

import pytest

from cluster.base.errors import InternalError
from replicas.leader.link_knowledge import LinkKnowledge
from replicas.worker.gathering import Gathered


def answers(*costs: bytes) -> dict[int, Gathered]:
    return {
        rank: Gathered(rank=rank, epoch="e", schemes=[], costs=held)
        for rank, held in enumerate(costs)
    }


@pytest.mark.parametrize(
    ("nodes", "probes", "why"),
    [
        ("aab", False, "no node has more ranks"),
        ("aabb", False, "no node has more ranks"),
        ("bbaa", False, "no node has more ranks"),
        ("aaabb", True, "more ranks are on a"),
        ("aac", True, "more ranks are on c"),
    ],
)
def test_costs_are_kept_while_no_node_is_fuller(nodes, probes, why):
    decision = LinkKnowledge("auto", b"x", tuple("aabb")).decide(tuple(nodes))
    assert decision.probes == probes
    assert why in decision.reason


def test_without_a_measurement_there_is_one():
    assert LinkKnowledge("auto", b"", ("a", "b")).decide(("a",)).probes


def test_a_scheme_that_was_asked_for_needs_no_costs():
    decision = LinkKnowledge("flat", b"", ("a",)).decide(("a", "b", "c"))
    assert not decision.probes
    assert "flat" in decision.reason


def test_what_was_measured_counts_from_then_on():
    links = LinkKnowledge("auto", b"old", ("a", "b"))
    decision = links.decide(("a", "c"))
    links.learn(decision, ("a", "c"), answers(b"new", b"new"))
    assert links.costs == b"new"
    assert not links.decide(("a", "c")).probes
    assert links.decide(("a", "b")).probes


def test_what_was_kept_still_counts_for_the_ranks_that_measured():
    links = LinkKnowledge("auto", b"old", ("a", "b", "b"))
    links.learn(links.decide(("a", "b")), ("a", "b"), answers(b"old", b"old"))
    assert not links.decide(("a", "b", "b")).probes


def test_ranks_that_hold_different_costs_are_refused():
    links = LinkKnowledge("auto", b"old", ("a", "b"))
    with pytest.raises(InternalError, match="different costs"):
        links.learn(links.decide(("a",)), ("a",), answers(b"x", b"y"))
    assert links.costs == b"old"
