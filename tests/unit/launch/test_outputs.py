"""What launch says about outputs that can't work on this machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runtime.config import ConfigError, load
from zerotop.launch import outputs
from zerotop.launch import start as launching
from zerotop.rundir.paths import runs_home


def check(section: dict[str, Any], environment: Mapping[str, str] | None = None) -> list[str]:
    config = load({"zerotop": section})
    return outputs.check_outputs(config, config.zerotop, on_gpu=False, environment=environment or {})


def problems(section: dict[str, Any], environment: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        check(section, environment)
    return raised.value.problems


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_installed", lambda module: True)


def test_every_wrong_rule_is_told_at_once() -> None:
    first, second = problems({"alerts": ["los > 10", "loss > 10", {"rule": "verdict is hung", "name": "x"}]})
    assert first.startswith("zerotop.alerts.0.rule: 'los > 10': unknown metric los. Did you mean loss? Known: loss, ")
    assert second.startswith("zerotop.alerts.2.rule: 'verdict is hung': unknown verdict hung")


def test_a_wrong_rule_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zerotop": {"alerts": ["los > 10"]}}))
    with pytest.raises(ConfigError, match=r"config.json: line 1: zerotop.alerts.0.rule: 'los > 10': unknown metric"):
        launching.start_run(config, device="cpu", name="never")
    assert not (runs_home() / "never").exists()


def test_a_rule_about_gpus_on_a_cpu_is_noted() -> None:
    assert check({"alerts": ["vram > 95%", "loss > 3"]}) == [
        "zerotop.alerts: 'vram > 95%' never fires here, because the run is on the CPU"
    ]


@pytest.mark.usefixtures("everything_installed")
def test_a_port_in_use_is_told_at_launch() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (problem,) = problems({"prometheus": {"port": port}})
    assert problem == f"zerotop.prometheus.port: {port} on 127.0.0.1 is in use; choose another, or 0 for a free one"
    assert check({"prometheus": {"port": port}}) == []


@pytest.mark.usefixtures("everything_installed")
def test_a_host_that_others_reach_is_warned_about_and_one_that_is_not_here_refused() -> None:
    (note,) = check({"prometheus": {"port": 0, "host": "0.0.0.0"}})
    assert "0.0.0.0 can read this run's metrics; there is no password" in note
    (problem,) = problems({"prometheus": {"port": 0, "host": "192.0.2.1"}})
    assert problem.startswith("zerotop.prometheus.host: can't listen on 192.0.2.1: ")
    (problem,) = problems({"prometheus": {"port": 0, "host": "no such host"}})
    assert problem.startswith("zerotop.prometheus.host: expected an address of this machine, got 'no such host'")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_installed", lambda module: module == "tensorboard")
    said = problems({"prometheus": {"port": 0}, "writers": [{"type": "tensorboard"}, {"type": "wandb"}]})
    there = "in zerotop's source folder"
    assert said == [
        f"zerotop.prometheus needs the package prometheus-client: pip install '.[prometheus]' {there}",
        f"zerotop.writers.1.type: wandb needs the package wandb: pip install '.[wandb]' {there}",
    ]


def test_a_webhook_from_the_environment() -> None:
    section = {"notify": [{"webhook": "$HOOK"}]}
    assert check(section, {"HOOK": "https://host/SECRET"}) == []
    (problem,) = problems(section)
    assert problem == "zerotop.notify.0.webhook: the environment variable HOOK is not set"
    (problem,) = problems(section, {"HOOK": "ftp://host/SECRET"})
    assert "HOOK does not hold a URL" in problem and "SECRET" not in problem


def test_a_program_that_is_not_there() -> None:
    (problem,) = problems({"notify": [{"command": ["no-such-program-anywhere"]}]})
    assert problem == "zerotop.notify.0.command: there is no program no-such-program-anywhere"
    assert check({"notify": [{"command": ["sh"]}]}) == []


def test_without_telemetry_there_is_nothing_to_watch() -> None:
    off = {"telemetry": {"enabled": False}}
    (problem,) = problems({**off, "alerts": ["no step for 5m"]})
    assert problem == "zerotop.telemetry.enabled: zerotop.alerts needs telemetry; set it to true"
    assert check({**off, "notify": [{"command": ["sh"]}]}) == []
