"""The keys for metrics, trackers, alerts and notifications."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runtime.config import ConfigError, Resolved, load
from runtime.config.outputs import DEFAULT_NOTICES, parse_duration


def problems(section: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        load({"zerotop": section})
    return raised.value.problems


def test_everything_at_once_survives_the_way_into_the_run_directory() -> None:
    section = {
        "prometheus": {"port": 0},
        "writers": [{"type": "tensorboard", "folder": "tb"}, {"type": "mlflow", "uri": "http://127.0.0.1:5000"}],
        "alerts": ["loss > 10 for 30s", {"rule": "vram > 95%", "name": "memory", "severity": "error"}],
        "notify": [
            {"webhook": "$HOOK", "on": ["memory", "loss > 10 for 30s", "failed"], "every": "1h"},
            {"command": ["notify-send", "{title}"], "resolved": False},
        ],
    }
    resolved = load({"zerotop": section}).resolve(2, "cpu")
    assert Resolved.from_json(resolved.to_json()) == resolved
    told = resolved.zerotop.notify
    assert (told[0].every, told[1].every, told[1].on, told[1].resolved) == (3600.0, 600.0, DEFAULT_NOTICES, False)
    assert [alert.rule for alert in resolved.zerotop.alerts] == ["loss > 10 for 30s", "vram > 95%"]
    assert resolved.zerotop.alerts[0].severity == "warning"


def test_without_them_nothing_is_on() -> None:
    section = load({}).resolve(1, "cpu").zerotop
    assert (section.prometheus, section.writers, section.alerts, section.notify) == (None, (), (), ())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        (" 10 M ", 600.0),
        ("1.5h", 5400.0),
        ("2d", 172_800.0),
        ("45", 45.0),
        ("250ms", 0.25),
        ("5min", 300.0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-3s", "ten", "3 weeks", "1m30s", "nan", "inf"])
def test_what_is_no_duration(text: str) -> None:
    assert parse_duration(text) is None


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"prometheus": {"prt": 1}}, "zerotop.prometheus.prt: unknown key. Did you mean zerotop.prometheus.port?"),
        ({"prometheus": {"port": 70000}}, "zerotop.prometheus.port: expected at most 65535, got 70000"),
        ({"writers": {}}, "zerotop.writers: expected a list, got {} (an object)"),
        ({"writers": [3]}, "zerotop.writers.0: expected an object, got 3"),
        ({"writers": [{"type": "tensorbord"}]}, "zerotop.writers.0.type: expected .* Did you mean tensorboard"),
        ({"writers": [{"type": "wandb", "projct": "x"}]}, "zerotop.writers.0.projct: unknown key. Did you mean .*proj"),
        ({"writers": [{"type": "wandb", "folder": "x"}]}, "wandb has no folder. Keys of wandb: project, name, in"),
        (
            {"writers": [{"type": "tensorboard", "folder": "a/"}, {"type": "tensorboard", "folder": "./a"}]},
            "zerotop.writers.1: zerotop.writers.0 writes the same metrics to the same place",
        ),
        ({"alerts": [7]}, 'zerotop.alerts.0: expected a rule such as "loss > 10 for 30s", or an object'),
        ({"alerts": [{"name": "x"}]}, "zerotop.alerts.0.rule: expected a value, got nothing"),
        ({"alerts": ["loss > 1", "loss > 1"]}, "zerotop.alerts.1: zerotop.alerts.0 has the same name, loss > 1"),
        ({"alerts": [{"rule": "loss > 1", "name": "hang"}]}, "zerotop.alerts.0.name: hang is a condition of its own"),
        ({"notify": [{}]}, 'zerotop.notify.0: expected "webhook": URL, or "command": '),
        ({"notify": [{"webhook": "http://a", "command": ["b"]}]}, "zerotop.notify.0: both are given; keep one"),
        ({"notify": [{"command": "notify-send"}]}, 'zerotop.notify.0.command: expected a list of a program and its'),
        ({"notify": [{"command": ["x"], "on": ["faild"]}]}, "unknown condition faild. Did you mean failed\\? Known: f"),
        ({"notify": [{"command": ["x"], "every": "soon"}]}, 'zerotop.notify.0.every: expected a time such as "30s"'),
        ({"notify": [{"command": ["x"], "every": -1}]}, "zerotop.notify.0.every: expected a time"),
    ],
)  # fmt: skip
def test_what_is_said_about_a_mistake(section: dict[str, Any], says: str) -> None:
    import re

    (problem,) = problems(section)
    assert re.search(says.replace("{}", "\\{\\}").replace("(an object)", "\\(an object\\)"), problem), problem


@pytest.mark.parametrize(
    "url",
    ["ftp://host/x", "host/x", "http://", "https://host:99999/", "http://host/ x", "http://host:0/", "http://[::1"],
)
def test_a_webhook_that_is_no_url_is_refused_and_never_repeated(url: str) -> None:
    secret = url + "SECRET" if url != "http://" else url
    (problem,) = problems({"notify": [{"webhook": secret}]})
    assert "expected a URL such as https://example.com/hook" in problem and "SECRET" not in problem


def test_a_mistake_in_a_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"zerotop": {\n"alerts": [\n  {"rul": "loss > 1"}]}}')
    with pytest.raises(ConfigError, match=r"line 2: zerotop.alerts.0.rul: unknown key"):
        load(path)
