"""The metrics page: names by convention, the figures of the state, nothing private, and quick enough."""

from __future__ import annotations

import json
import math
import re
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from runtime.wire.judgement import Alert, Verdict
from runtime.wire.messages import Memory, RunStatus
from tests.harness import ROOT
from tests.harness.fakehub import hello, step_result
from tests.unit.state.test_gpu import gpu, node
from zerotop.outputs.families import FAMILIES
from zerotop.outputs.prometheus import MetricsServer, RunCollector
from zerotop.state.run import RunState

UNITS = ("seconds", "bytes", "ratio", "watts", "joules", "celsius", "hertz", "per_second", "info", "total")
WITHOUT_UNIT = re.compile(
    r"zerotop_(?:rank_|gpu_|node_)?(?:run_state|run_stalled|verdict|alert_firing|attempt|last_checkpoint_step|step|"
    r"steps_planned|loss|evaluation_loss|learning_rate|gradient_norm|loss_scale|phase|throttled|lost|load1)"
)


def a_run(ranks: int = 2) -> RunState:
    state = RunState()
    state.apply(RunStatus(name="r1", state="running", attempt=1, restarts=2, started_wall_s=5.0))
    for rank in range(ranks):
        device = {"device": f"cuda:{rank}", "device_uuid": f"GPU-{rank}", "model_name": "/home/somebody/models/tiny"}
        state.apply(hello(rank, world_size=ranks, **device), 1)
        state.apply(step_result(rank, 7, loss=2.5, wait_ms=30.0, step_ms=100.0), 1)
        memory: dict[str, Any] = {"ledger": {"parameters": 1000}, "host_total_bytes": 10, "at_ns": 0, "rss_bytes": 4096}
        state.apply(Memory(rank=rank, **memory), 1)
    state.apply(node(*(gpu(index, power_w=650.0, energy_j=1e6) for index in range(ranks))))
    return state


def page(state: RunState) -> str:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry(auto_describe=False)
    registry.register(RunCollector("r1", lambda: state, threading.Lock()))
    text: str = prometheus.generate_latest(registry).decode()
    return text


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"zerotop_[a-z][a-z0-9_]*", family.sample_name)
        assert family.sample_name.endswith(UNITS) or WITHOUT_UNIT.fullmatch(family.sample_name), family.sample_name
        assert (family.kind == "counter") == family.sample_name.endswith("_total")
        assert family.description.endswith(".")
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)


def test_every_family_is_on_the_page_of_a_run_that_has_said_nothing() -> None:
    text = page(RunState())
    assert [family.name for family in FAMILIES if f"# HELP zerotop_{family.name}" not in text] == []


def test_the_figures() -> None:
    state = a_run()
    state.apply(Verdict(what="straggler", severity="warning", ranks=[1], text="x"))
    fields = {"name": 'loss > "10"', "rule": "loss > 10", "state": "firing", "severity": "error"}
    state.apply(Alert.model_validate(fields))
    text = page(state)
    for line in (
        'zerotop_loss{run="r1"} 2.5',
        'zerotop_restarts_total{run="r1"} 2.0',
        'zerotop_run_state{run="r1",state="running"} 1.0',
        'zerotop_run_state{run="r1",state="failed"} 0.0',
        'zerotop_verdict{ranks="1",run="r1",severity="warning",what="straggler"} 1.0',
        r'zerotop_alert_firing{alert="loss > \"10\"",run="r1",severity="error"} 1.0',
        'zerotop_rank_wait_seconds{rank="1",run="r1"} 0.03',
        'zerotop_rank_memory_bytes{category="parameters",rank="0",run="r1"} 1000.0',
        'zerotop_gpu_power_watts{gpu="1",host="box",rank="1",run="r1"} 650.0',
        'zerotop_gpu_energy_joules_total{gpu="0",host="box",rank="0",run="r1"} 1e+06',
        'zerotop_run_info{global_batch="8",model="tiny",precision="bf16",run="r1",stage="2",world_size="2"} 1.0',
    ):
        assert line in text.splitlines(), line


def test_no_path_is_on_the_page() -> None:
    assert "/home" not in page(a_run()) and "somebody" not in page(a_run())


def test_a_loss_that_is_no_number_is_one_to_prometheus() -> None:
    state = a_run()
    state.apply(step_result(0, 8, loss=math.nan))
    assert 'zerotop_loss{run="r1"} NaN' in page(state)


def test_the_endpoint_answers_and_is_gone_when_closed() -> None:
    pytest.importorskip("prometheus_client")
    lock = threading.Lock()
    server = MetricsServer("127.0.0.1", 0, RunCollector("r1", lambda: a_run(64), lock))
    threads = threading.active_count()
    with urllib.request.urlopen(server.url, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert 'zerotop_rank_step{rank="63",run="r1"} 7.0' in answer.read().decode()
    assert not lock.locked()
    server.close()
    assert threading.active_count() < threads
    with pytest.raises(OSError):
        urllib.request.urlopen(server.url, timeout=10)


DASHBOARD = ROOT / "docs" / "grafana.json"


def _expressions(part: Any) -> list[str]:
    if isinstance(part, dict):
        own = [part[key] for key in ("expr", "query", "definition") if isinstance(part.get(key), str)]
        return own + [text for value in part.values() for text in _expressions(value)]
    return [text for value in part for text in _expressions(value)] if isinstance(part, list) else []


def test_the_dashboard_names_only_metrics_that_are_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    known = {family.sample_name: set(family.labels) | {"run"} for family in FAMILIES}
    texts = _expressions(dashboard)
    named = {name for text in texts for name in re.findall(r"\bzerotop_\w+", text)}
    assert len(named) > 20 and named <= set(known)
    for text in texts:
        for name, selectors in re.findall(r"\b(zerotop_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)\s*[=!]~?=?", selectors)) <= known[name], text


def test_the_dashboard_is_one_that_grafana_imports() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert dashboard["title"] == "zerotop" and dashboard["uid"] == "zerotop" and dashboard["schemaVersion"] >= 39
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}" and panel["targets"]
    taken = [(p["gridPos"], p["title"]) for p in dashboard["panels"]]
    for index, (one, title) in enumerate(taken):
        for other, _ in taken[index + 1 :]:
            apart = (
                one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
                or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
            )  # fmt: skip
            assert apart, title


def test_the_documentation_lists_every_metric() -> None:
    text = (Path(ROOT) / "docs" / "alerts.md").read_text()
    assert [family.sample_name for family in FAMILIES if f"`{family.sample_name}`" not in text] == []
