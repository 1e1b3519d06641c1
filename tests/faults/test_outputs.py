"""The outputs of runs under the real supervisor: metrics, trackers and notifications come from a process of their own,
which never holds up the run, and is gone with it."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.wire.messages import Event
from runtime.wire.rundir import read_run, read_status
from tests.harness.runs import StartedRun
from tests.harness.waiting import until
from tests.harness.webhook import WebhookServer
from zerotop.documents import status_document, status_text
from zerotop.hub.recorder import read_messages
from zerotop.supervise import outputs

Start = Callable[..., StartedRun]


@pytest.fixture
def server() -> Iterator[WebhookServer]:
    server = WebhookServer()
    yield server
    server.close()


def with_section(tmp_path: Path, section: dict[str, Any]) -> dict[str, Any]:
    """Arguments of start_run with this `zerotop` section."""
    path = tmp_path / "with-outputs.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zerotop": section}))
    return {"config_path": path}


def events(run: StartedRun, what: str) -> list[str]:
    return [event.text for event in run.source.state.events if isinstance(event, Event) and event.what == what]


def process_of(run: StartedRun) -> psutil.Process:
    """The outputs' process."""

    def look() -> list[psutil.Process]:
        supervisor = psutil.Process(read_run(run.path).supervisor_pid)
        return [child for child in supervisor.children() if outputs.MODULE in child.cmdline()]

    return until(look, "the outputs' process")[0]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def test_metrics_are_served_while_the_run_lives(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    run = start(with_section(tmp_path, {"prometheus": {"port": 0}}))
    run.see_step(5)
    run.see(lambda source: events(run, "outputs"), "the address of the metrics")
    (said,) = events(run, "outputs")
    url = said.removeprefix("metrics for Prometheus at ")
    assert url.startswith("http://127.0.0.1:") and url.endswith("/metrics")
    until(lambda: f'zerotop_rank_step{{rank="1",run="{run.path.name}"}}' in get(url), "both ranks")
    listening = [one for one in process_of(run).net_connections("inet") if one.status == psutil.CONN_LISTEN]
    assert [one.laddr.ip for one in listening] == ["127.0.0.1"]
    assert str(tmp_path) not in get(url)
    run.command("stop")
    run.see_end("stopped")
    with pytest.raises(OSError):
        get(url)


def test_tensorboard_gets_every_step(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tests.unit.outputs.test_tensorboard import scalars

    run = start(with_section(tmp_path, {"writers": [{"type": "tensorboard"}]}), FAKE_STEPS=40, FAKE_STEP_S=0.05)
    run.see_end("finished")
    found = scalars(tmp_path / "tensorboard" / run.path.name)
    steps = [step for step, _ in found["train/loss"]]
    assert steps == list(range(1, 41)) or (steps == sorted(set(steps)) and steps[-1] == 40 and len(steps) > 20)
    assert dict(found["train/loss"])[40] == pytest.approx(5.0 / 40)


def test_an_alert_fires_in_the_screen_in_status_and_at_the_webhook(
    start: Start, tmp_path: Path, server: WebhookServer
) -> None:
    section = {
        "alerts": [{"rule": "loss < 1", "name": "converged"}, "loss > 100"],
        "notify": [{"webhook": server.url, "on": ["alert", "finished"]}],
    }
    run = start(with_section(tmp_path, section), FAKE_STEPS=200)
    run.see(lambda source: source.state.firing(), "the alert")
    (alert,) = run.source.state.firing()
    assert (alert.name, alert.rule, alert.severity) == ("converged", "loss < 1", "warning")
    document = status_document(run.source.state)
    assert [(one["name"], one["state"]) for one in document["alerts"]] == [("converged", "firing")]
    assert "alert: converged: loss 0." in status_text(document)
    run.see_end("finished")
    told = server.see("converged")
    assert told["text"] == told["content"] and told["text"].startswith(f"▲ {run.path.name}: converged: loss 0.")
    assert server.see("finished", "ended")["step"] == 200
    assert [one["what"] for one in server.got] == ["converged", "finished"]
    assert any(getattr(message, "kind", "") == "alert" for message in read_messages(run.path))
    recorded = (run.path / "recording.sqlite").read_bytes()
    assert b"SECRET" not in recorded


def test_a_webhook_that_never_answers_holds_up_nothing(start: Start, tmp_path: Path, server: WebhookServer) -> None:
    server.hangs.set()
    section = {"alerts": ["loss < 100"], "notify": [{"webhook": server.url, "on": ["alert"]}]}
    run = start(with_section(tmp_path, section))
    until(lambda: server.tries, "a try")
    before = run.source.state.step
    run.see_step(before + 50)
    assert run.command("checkpoint").ack.state == "applied"
    assert run.command("stop").ack.state == "applied"
    run.see_end("stopped", deadline_s=40)
    assert read_status(run.path).state == "stopped"


def test_a_command_gets_the_values_and_the_document(start: Start, tmp_path: Path) -> None:
    said, given = tmp_path / "said", tmp_path / "given"
    command = ["sh", "-c", 'printf "%s\\n" "$0" "$1" > "$2"; cat > "$3"', "{what}: {state}", "{run} {nobody}"]
    section = {"notify": [{"command": [*command, str(said), str(given)], "on": ["failed"]}]}
    launch = {**with_section(tmp_path, section), "overrides": ["zerotop.restarts.limit=0"]}
    run = start(launch, FAKE_CRASH="1:5")
    run.see_end("failed")
    assert said.read_text().splitlines() == ["failed: ended", f"{run.path.name} {{nobody}}"]
    document = json.loads(given.read_text())
    assert document["ranks"] == [1] and document["severity"] == "error" and "rank 1" in document["text"]


def test_a_restart_is_told_and_spares_the_outputs(start: Start, tmp_path: Path, server: WebhookServer) -> None:
    section = {"notify": [{"webhook": server.url, "on": ["restarted"]}]}
    run = start(with_section(tmp_path, section), FAKE_EVERY=5, FAKE_CRASH="1:8", FAKE_IGNORE_TERM=1)
    process = process_of(run)
    told = server.see("restarted")
    assert "rank 1" in told["text"]
    run.see_step(7, attempt=2)
    assert process.is_running() and process_of(run).pid == process.pid


def test_a_process_that_dies_is_started_again_and_its_death_is_told(
    start: Start, tmp_path: Path, server: WebhookServer
) -> None:
    run = start(with_section(tmp_path, {"notify": [{"webhook": server.url, "on": ["stopped"]}]}))
    run.see_step(2)
    first = process_of(run)
    first.kill()
    run.see(lambda source: events(run, "outputs"), "the event")
    assert "ended (exit code -9)" in events(run, "outputs")[0]
    until(lambda: process_of(run).pid != first.pid, "another process")
    run.command("stop")
    run.see_end("stopped")
    server.see("stopped", "ended")


def test_the_death_of_the_supervisor_is_told_and_nothing_is_left(
    start: Start, tmp_path: Path, server: WebhookServer
) -> None:
    run = start(with_section(tmp_path, {"notify": [{"webhook": server.url, "on": ["failed"]}]}))
    run.see_step(2)
    process = process_of(run)
    until(lambda: "zerotop.outputs" in process.cmdline() and process.num_threads() > 2, "its threads")
    os.kill(read_run(run.path).supervisor_pid, signal.SIGKILL)
    assert "the supervisor was killed" in server.see("failed", "ended")["text"]
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "its end")


def test_a_port_that_is_taken_between_check_and_start_costs_only_the_metrics(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("prometheus_client")
    from zerotop.launch import outputs as checks

    monkeypatch.setattr(checks, "_endpoint", lambda endpoint, notes: [])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = start(with_section(tmp_path, {"prometheus": {"port": taken.getsockname()[1]}}), FAKE_STEPS=100)
        run.see(lambda source: events(run, "outputs"), "the event")
        run.see_end("finished")
    assert "no metrics for Prometheus: can't listen on port" in events(run, "outputs")[0]


def test_a_stream_from_the_start_has_every_step_once(
    start: Start, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from zerotop.cli import main

    run = start(FAKE_STEPS=150)
    run.see_step(30)
    assert main(["stream", run.path.name, "--from-start", "--kind", "step"]) == 0
    steps = [one["step"] for one in map(json.loads, capfd.readouterr().out.splitlines()) if one["source"] == "rank/0"]
    assert steps == list(range(1, 151))


def test_a_process_that_hangs_holds_up_neither_the_run_nor_its_end(
    start: Start, tmp_path: Path, server: WebhookServer
) -> None:
    run = start(with_section(tmp_path, {"notify": [{"webhook": server.url}]}))
    run.see_step(2)
    process = process_of(run)
    process.suspend()
    before = run.source.state.step
    run.see_step(before + 50)
    assert run.command("stop").ack.state == "applied"
    run.see_end("stopped", deadline_s=outputs.PATIENCE_S + 20)
    until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "its end")
