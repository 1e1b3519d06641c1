"""The screen in a browser: only behind its address, only from its own page, read-only unless asked, and gone after."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.wire.messages import RunStatus
from tests.harness import ROOT
from tests.harness.browser import CHROMIUM, open_page
from tests.harness.fakehub import FakeHub
from tests.harness.fakerun import write_run
from tests.harness.longrun import SpokenRun, write
from tests.harness.waiting import patient, until, until_async
from zerotop.cli import main

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("textual_serve")
pytestmark = pytest.mark.timeout(180)
Serve = Callable[..., "Served"]


class Served:
    """A `zerotop web` process, and where it serves."""

    def __init__(self, words: tuple[str, ...], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zerotop", "web", *words, "--json"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        lines = ""
        while not lines.rstrip().endswith("}"):
            line = self.process.stdout.readline()
            assert line, self.process.communicate()[1]
            lines += line
        self.address: str = json.loads(lines)["address"]
        self.origin = self.address.rsplit("/", 2)[0]

    def screens(self) -> list[psutil.Process]:
        """The processes that draw."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.communicate(timeout=patient(30))
        return self.process.returncode


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def serve(home: Path) -> Iterator[Serve]:
    served: list[Served] = []

    def start(*words: str) -> Served:
        served.append(Served(words, {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}))
        return served[-1]

    yield start
    for one in served:
        one.end()


@pytest.fixture
def recorded(home: Path) -> Path:
    run = SpokenRun()
    for _ in range(60):
        run.second()
    return write(write_run(home, "q1", home, RunStatus(name="q1", state="finished", attempt=1)), run)


@pytest.fixture
def hub(home: Path) -> Iterator[FakeHub]:
    folder = Path(tempfile.mkdtemp(prefix="zt-", dir="/tmp"))
    hub = FakeHub(folder)
    write_run(home, "live", folder, RunStatus(name="live", state="running", attempt=1))
    yield hub
    hub.close()
    shutil.rmtree(folder)


async def shown(socket: Any, words: str) -> None:
    """Read what is drawn until `words` have come."""
    text = ""
    async with asyncio.timeout(patient(40)):
        while words not in text:
            message = await socket.receive()
            assert message.type in (aiohttp.WSMsgType.BINARY, aiohttp.WSMsgType.TEXT), message
            text += message.data.decode(errors="replace") if isinstance(message.data, bytes) else message.data


async def test_only_the_address_opens_it_and_only_from_its_own_page(recorded: Path, serve: Serve) -> None:
    served = serve("q1", "--replay")
    assert served.address.startswith("http://127.0.0.1:") and len(served.address.rsplit("/", 2)[1]) >= 32
    async with aiohttp.ClientSession() as session:
        for path in ("/", "/ws", "/static/js/textual.js", f"/{'A' * 32}/"):
            async with session.get(served.origin + path) as answer:
                assert answer.status == 404
        async with session.get(served.address) as answer:
            assert answer.status == 200 and answer.headers["Referrer-Policy"] == "no-referrer"
            page = await answer.text()
        assert served.address.removeprefix("http:") + "ws" in page
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await session.ws_connect(served.address + "ws", headers={"Origin": "http://evil.example"})
        assert refused.value.status == 403 and not served.screens()
        async with session.ws_connect(served.address + "ws?width=100&height=30") as socket:
            await shown(socket, "REPLAY")
            drawing = served.screens()
            assert drawing
        await until_async(lambda: not any(process.is_running() for process in drawing), "the end of the screen", 30)
    assert served.end() == 0


@pytest.mark.parametrize("control", [False, True])
async def test_it_steers_only_if_asked(hub: FakeHub, serve: Serve, control: bool) -> None:
    served = serve("live", *(["--control"] if control else []))
    async with aiohttp.ClientSession() as session, session.ws_connect(served.address + "ws?width=120&height=40") as ws:
        await shown(ws, "live")
        await ws.send_json(["stdin", "P"])
        if control:
            await until_async(lambda: any(command.name == "pause" for command in hub.commands), "a pause", 40)
        else:
            await ws.send_json(["stdin", "?"])
            await shown(ws, "this screen is read-only")
            assert not hub.commands
    assert served.end(signal.SIGINT) == 0


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium")
async def test_a_real_browser_shows_it_and_its_keys_work(recorded: Path, serve: Serve, tmp_path: Path) -> None:
    served = serve("q1", "--replay")
    async with open_page(f"{served.address}?fontsize=14") as page:
        await page.until("document.body.classList.contains('-first-byte')", patient(60))
        picture = tmp_path / "screen.png"
        picture.touch()
        await page.type("]")
        # An empty page is a picture of some kilobytes; one full of text is several times as large.
        await until_async(
            lambda: picture.stat().st_size > 15_000, "a picture of text", 30, between=lambda: page.picture(picture)
        )
        await page.type("q")
        await page.until("document.body.classList.contains('-closed')", patient(30))
    until(lambda: not served.screens(), "the end of the screen", 30)
    assert served.end() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody"], "there is no run called 'nobody'"),
        (["q1", "--control", "--replay"], "a replay reaches no run"),
        (["q1", "--port", "70000"], "--port: expected 1 to 65535"),
    ],
)
def test_what_is_asked_wrongly(
    recorded: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["web", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_message(recorded: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    served = serve("q1", "--replay")
    assert main(["web", "q1", "--port", served.origin.rsplit(":", 1)[1]]) == 2
    assert "leave out --port for a free one" in capsys.readouterr().err
