"""Environment, ids, log lines and the metric table."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.base.env import VARIABLES, default_cache_dir, read_environment, set_ray_defaults
from cluster.base.errors import ConfigError
from cluster.base.ids import is_client_id, new_epoch, new_request_id
from cluster.base.log import LogStyle, configure_logging, neutral
from cluster.base.metrics import METRICS, MetricKind


def test_state_directory_order():
    everything = {"PENSTOCK_STATE_DIR": "/a", "XDG_STATE_HOME": "/b", "HOME": "/c"}
    assert read_environment(everything).state_dir == Path("/a")
    del everything["PENSTOCK_STATE_DIR"]
    assert read_environment(everything).state_dir == Path("/b/penstock")
    del everything["XDG_STATE_HOME"]
    assert read_environment(everything).state_dir == Path("/c/.local/state/penstock")


def test_ray_is_kept_calm_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(os, "environ", {"HOME": "/h", "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1"})
    set_ray_defaults()
    assert os.environ["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "0.1"
    assert os.environ["RAY_SERVE_METRICS_EXPORT_INTERVAL_MS"] == "1000"


def test_environment_values():
    env = read_environment({"HOME": "/h"})
    assert (env.log_level, env.cuda_visible_devices, env.hub_offline) == ("info", None, False)
    env = read_environment(
        {
            "HOME": "/h",
            "PENSTOCK_LOG_LEVEL": "DEBUG",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
    )
    assert (env.log_level, env.cuda_visible_devices, env.hub_offline) == ("debug", "", True)
    with pytest.raises(ConfigError, match="PENSTOCK_LOG_LEVEL"):
        read_environment({"HOME": "/h", "PENSTOCK_LOG_LEVEL": "loud"})


def test_every_variable_that_is_read_is_documented():
    source = (Path(__file__).parents[3] / "cluster/base/env.py").read_text()
    body = source[source.index("def read_environment") :]
    for name in ("PENSTOCK_STATE_DIR", "PENSTOCK_LOG_LEVEL", "CUDA_VISIBLE_DEVICES"):
        assert name in body
        assert VARIABLES[name]


def test_ids_are_fresh_and_safe():
    ids = {new_request_id() for _ in range(1000)} | {new_epoch("leader") for _ in range(1000)}
    assert len(ids) == 2000
    assert all(is_client_id(one) for one in ids)
    for bad in ("", "a b", "a\n", "x" * 65, "a/b", "é"):
        assert not is_client_id(bad)


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("style", list(LogStyle))
def test_a_log_record_is_one_harmless_line(style: LogStyle, root_logger: logging.Logger):
    stream = io.StringIO()
    configure_logging("info", style, stream)
    configure_logging("info", style, stream)
    attack = "a\r\nfake line\x1b[2J\x85\u2028b"
    log = logging.getLogger("test.log")
    try:
        raise ValueError(attack)
    except ValueError:
        log.exception("lost %s", attack, extra={"request_id": attack, "size": 3})
    log.debug("not shown")
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    assert "fake line" in text
    assert "size" in text


def test_json_lines_carry_facts(root_logger: logging.Logger):
    stream = io.StringIO()
    configure_logging("warning", LogStyle.JSON, stream)
    logging.getLogger("replicas.leader").warning(
        "worker %d is gone", 3, extra={"request_id": "r-1", "odd": object(), "level": "x"}
    )
    line = json.loads(stream.getvalue())
    assert line["message"] == "worker 3 is gone"
    assert (line["level"], line["logger"], line["request_id"]) == (
        "warning",
        "replicas.leader",
        "r-1",
    )
    assert line["time_s"] > 1.6e9


def test_neutral_leaves_plain_text_alone():
    assert neutral("Grüße 你好 🙂") == "Grüße 你好 🙂"


def test_metric_names_follow_the_rules():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.name.startswith("penstock_")
        assert metric.help.endswith(".")
        assert (metric.kind is MetricKind.COUNTER) == metric.name.endswith("_total")
        assert bool(metric.buckets) == (metric.kind is MetricKind.HISTOGRAM)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        if metric.unit:
            assert metric.unit in metric.name
        assert set(metric.labels) <= {
            "model",
            "code",
            "reason",
            "outcome",
            "layer",
            "expert",
        }


def test_prometheus_accepts_the_table():
    registry = CollectorRegistry()
    for metric in METRICS:
        labels = dict.fromkeys(metric.labels, "x")
        match metric.kind:
            case MetricKind.COUNTER:
                Counter(metric.name, metric.help, metric.labels, registry=registry).labels(**labels)
            case MetricKind.GAUGE:
                Gauge(metric.name, metric.help, metric.labels, registry=registry).labels(**labels)
            case MetricKind.HISTOGRAM:
                Histogram(
                    metric.name,
                    metric.help,
                    metric.labels,
                    registry=registry,
                    buckets=metric.buckets,
                ).labels(**labels)
    page = generate_latest(registry).decode()
    assert all(f"# HELP {metric.name} " in page for metric in METRICS)


def test_cache_directory_follows_its_variables() -> None:
    everything = {"PENSTOCK_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}
    assert default_cache_dir(everything) == Path("/a")
    del everything["PENSTOCK_CACHE_DIR"]
    assert default_cache_dir(everything) == Path("/b/penstock")
    assert default_cache_dir({"HOME": "/c"}) == Path("/c/.cache/penstock")
