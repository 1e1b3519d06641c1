"""Webhooks and commands: tries, limits, and what is said when nothing helps."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.waiting import patient, until
from tests.harness.webhook import WebhookServer
from zerotop.outputs import delivery
from zerotop.outputs.delivery import DeliveryError, Receiver, command, fill, webhook, webhook_name

FAST = (0.01, 0.01, 0.01)


@pytest.fixture
def server() -> Iterator[WebhookServer]:
    server = WebhookServer()
    yield server
    server.close()


def soon() -> float:
    return time.monotonic() + patient(10)


def test_a_document_arrives_as_json(server: WebhookServer) -> None:
    reports: list[str] = []
    receiver = Receiver("w", webhook(server.url), reports.append)
    assert receiver.put({"text": "größer ✖", "title": "t"})
    receiver.close(soon())
    assert server.got == [{"text": "größer ✖", "title": "t"}] and reports == []
    assert server.paths == ["/hook/SECRET"]


def test_a_temporary_failure_is_tried_again_and_a_lasting_one_is_not(server: WebhookServer) -> None:
    reports: list[str] = []
    receiver = Receiver(webhook_name(server.url), webhook(server.url), reports.append, FAST)
    server.answers = [500, 429, 200]
    receiver.put({"title": "first"})
    until(lambda: server.got, "the third try")
    server.answers = [404, 200]
    receiver.put({"title": "second"})
    until(lambda: reports, "the report")
    receiver.close(soon())
    assert [one["title"] for one in server.got] == ["first"] and server.tries == 4
    assert len(reports) == 1
    assert (
        reports[0].startswith("webhook http://127.0.0.1:") and "'second' not delivered: it answered 404" in reports[0]
    )
    assert "SECRET" not in reports[0]


def test_it_gives_up_after_some_tries(server: WebhookServer) -> None:
    reports: list[str] = []
    receiver = Receiver("w", webhook(server.url), reports.append, FAST)
    server.answers = [500] * 4
    receiver.put({"title": "first"})
    until(lambda: reports, "the report")
    receiver.put({"title": "second"})
    receiver.close(soon())
    assert reports == ["w: 'first' not delivered after 4 tries: it answered 500 Internal Server Error"]
    assert [one["title"] for one in server.got] == ["second"]


def test_a_redirect_is_not_followed(server: WebhookServer) -> None:
    server.answers = [302]
    with pytest.raises(DeliveryError, match="it answered 302") as raised:
        webhook(server.url)({"title": "x"}, 5.0)
    assert not raised.value.again and server.tries == 1


def test_no_answer_and_nobody_there(server: WebhookServer) -> None:
    server.hangs.set()
    with pytest.raises(DeliveryError, match=r"no answer within 0\.2 s"):
        webhook(server.url)({"title": "x"}, 0.2)
    with pytest.raises(DeliveryError, match="Connection refused"):
        webhook("http://127.0.0.1:9/")({"title": "x"}, 5.0)


def test_one_that_does_not_answer_never_holds_up_the_caller_nor_the_end(server: WebhookServer) -> None:
    server.hangs.set()
    reports: list[str] = []
    receiver = Receiver("w", webhook(server.url), reports.append)
    assert all(receiver.put({"title": str(index)}) for index in range(delivery.QUEUED))
    until(lambda: server.tries, "a try")
    assert receiver.put({"title": "one more"})
    assert not receiver.put({"title": "and one too many"})
    began = time.monotonic()
    receiver.close(began + 0.3)
    assert time.monotonic() - began < patient(2)
    assert reports[-1] == f"w: gave up at the end of the run, {delivery.QUEUED} not delivered"


def test_a_command_gets_values_as_arguments_without_a_shell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    document: dict[str, Any] = {"title": '$(touch pwned); "x"', "step": 7}
    command(["sh", "-c", 'printf "%s" "$0" > "$1"; cat >> "$1"', "{title} {step} {unknown}", str(out)])(document, 10.0)
    assert out.read_text() == '$(touch pwned); "x" 7 {unknown}' + json.dumps(document)
    assert not (tmp_path / "pwned").exists() and not Path("pwned").exists()


def test_what_is_said_about_a_command_that_fails() -> None:
    with pytest.raises(DeliveryError, match=r"exit code 3: no display$") as raised:
        command(["sh", "-c", "echo first >&2; echo no display >&2; exit 3"])({}, 10.0)
    assert not raised.value.again
    with pytest.raises(DeliveryError, match="No such file"):
        command(["/nowhere/at/all"])({}, 10.0)


def test_a_command_that_does_not_end_is_killed() -> None:
    threads = threading.active_count()
    with pytest.raises(DeliveryError, match="not done within 1 s, killed"):
        command(["sleep", "600"])({}, 0.5)
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("word", "filled"),
    [
        ("{a}", "1"),
        ("{a}{b}", "1{a}"),
        ("{", "{"),
        ("{a", "{a"),
        ("}{a}{", "}1{"),
        ("{nobody}", "{nobody}"),
        ("{c}", "xy"),
    ],
)
def test_fill(word: str, filled: str) -> None:
    assert fill(word, {"a": 1, "b": "{a}", "c": "x\0y"}) == filled
