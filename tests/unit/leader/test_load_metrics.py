"""Every leader metric of the table has a value, and nothing else is exported."""

from cluster.base.metrics import METRICS, MetricSource
from replicas.api import ReplicaStats
from replicas.engine.step_ledger import StepTimes
from replicas.engine.weight_traffic import WeightTraffic
from replicas.leader.load_metrics import leader_values


def test_every_leader_metric_has_a_value():
    declared = {metric.name for metric in METRICS if metric.source is MetricSource.LEADER}
    values = leader_values(ReplicaStats(), StepTimes())
    assert {metric.name for metric in values} == declared


def test_values_come_from_the_right_totals():
    stats = ReplicaStats(num_running=3, kv_blocks_free=7, generated_tokens=11)
    traffic = WeightTraffic(read_bytes=9, expert_misses=4, early_useful=2, early_wasted=1)
    times = StepTimes(
        num_steps=5, num_tokens=40, schedule_s=1.0, execute_s=2.0, update_s=0.5, traffic=traffic
    )
    values = {metric.name: value for metric, value in leader_values(stats, times).items()}
    assert values["penstock_running_requests"] == 3
    assert values["penstock_kv_blocks_free"] == 7
    assert values["penstock_engine_generated_tokens_total"] == 11
    assert values["penstock_steps_total"] == 5
    assert values["penstock_step_seconds_total"] == 3.5
    assert values["penstock_streamed_weight_bytes_total"] == 9
    assert values["penstock_streamed_expert_misses_total"] == 4
    assert values["penstock_early_experts_used_total"] == 2
    assert values["penstock_early_experts_wasted_total"] == 1
