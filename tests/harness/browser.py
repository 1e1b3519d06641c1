"""A headless Chromium, driven over its DevTools protocol: opens a page, types, and takes pictures."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
_LISTENS = re.compile(rb"DevTools listening on ws://127\.0\.0\.1:(\d+)/")


class Page:
    """One page of the browser."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._number = 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            answer = json.loads((await self._socket.receive()).data)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    async def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return (await self.call("Runtime.evaluate", expression=expression))["result"].get("value")

    async def until(self, expression: str, deadline_s: float) -> None:
        """Wait until the expression is true."""
        end = asyncio.get_running_loop().time() + deadline_s
        while not await self.value(expression):
            assert asyncio.get_running_loop().time() < end, f"not within {deadline_s:g} s: {expression}"
            await asyncio.sleep(0.1)

    async def type(self, keys: str) -> None:
        """Type into the page, once it has been clicked."""
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=300, y=200, button="left", clickCount=1)
        for key in keys:
            await self.call("Input.dispatchKeyEvent", type="keyDown", text=key, key=key)
            await self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def picture(self, target: Path) -> None:
        """Save the page as a PNG picture."""
        shot = await self.call("Page.captureScreenshot", format="png")
        target.write_bytes(base64.b64decode(shot["data"]))


@contextlib.asynccontextmanager
async def open_page(address: str, width: int = 1200, height: int = 800) -> AsyncIterator[Page]:
    """A browser with one page; both are gone afterwards."""
    import aiohttp

    with tempfile.TemporaryDirectory(prefix="zt-chromium-", ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
            f"--window-size={width},{height}", f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert process.stderr is not None
            while not (found := _LISTENS.search(line := await process.stderr.readline())):
                assert line, "the browser ended"
            drain = asyncio.create_task(process.stderr.read())
            tools = f"http://127.0.0.1:{found[1].decode()}"
            async with aiohttp.ClientSession() as session:
                async with session.put(f"{tools}/json/new?{address}") as answer:
                    page = await answer.json(content_type=None)
                async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Page(socket)
            drain.cancel()
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()
