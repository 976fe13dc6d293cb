"""The leader's view of its experts is the sum of what its ranks say."""

from __future__ import annotations

from cluster.base.plan import from_json, to_json
from moe.expert_table import starting_tables
from replicas.leader.expert_watch import ExpertWatch
from replicas.leader.record import ExpertRecord


def state(*rows: list[int], dropped: int = 0) -> dict:
    return {"layers": [0, 2], "rows": list(rows), "num_dropped": dropped}


def test_totals_of_the_ranks_are_added_up_and_the_busiest_rank_counts():
    tables = {table.layer: table for table in starting_tables([(0, 4), (2, 2)], 2)}
    watch = ExpertWatch(tuple(tables.values()))
    watch.add([state([5, 1, 0, 0], [1, 1], dropped=2), state([0, 0, 1, 1], [1, 1])])
    record = watch.record(tables)
    assert [layer.rows for layer in record.layers] == [(5, 1, 1, 1), (2, 2)]
    assert [layer.layer for layer in record.layers] == [0, 2]
    assert [layer.imbalance for layer in record.layers] == [1.5, 1.0]
    assert record.num_dropped == 2
    assert from_json(ExpertRecord, to_json(record)) == record


def test_what_was_long_ago_counts_less():
    tables = {table.layer: table for table in starting_tables([(0, 2), (2, 2)], 2)}
    watch = ExpertWatch(tuple(tables.values()), half_life_rows=100)
    watch.add([state([1000, 0], [0, 0])])
    watch.add([state([1000, 1000], [0, 0])])
    first, second = watch.loads()[0]
    assert first < 0.1 * second
    assert watch.record(tables).layers[0].rows == (1000, 1000)
