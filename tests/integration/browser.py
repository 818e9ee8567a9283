"""A headless Chromium, driven over its own protocol (CDP) with aiohttp, which Ray brings along."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")


def why_not() -> str | None:
    """Why there is no browser here, or None."""
    if any(shutil.which(name) for name in NAMES):
        return None
    return f"none of {', '.join(NAMES)} is installed"


class Page:
    """The page of a browser."""

    def __init__(self, runner: asyncio.Runner, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._runner, self._socket = runner, socket
        self._number = 0

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def ask(self, code: str) -> Any:
        """The value of an expression; None while another page is being loaded."""
        told = self._call("Runtime.evaluate", expression=code, returnByValue=True)
        if "error" in told:
            assert "navigated" in told["error"]["message"], told
            return None
        assert "exceptionDetails" not in told["result"], told
        return told["result"]["result"].get("value")

    @property
    def text(self) -> str:
        """All that a person sees on it."""
        return str(self.ask("document.body ? document.body.innerText : ''"))

    def wait(self, code: str, timeout_s: float = 120.0) -> Any:
        """Wait until an expression is true; its value."""
        deadline_s = time.monotonic() + timeout_s
        while not (value := self.ask(code)):
            assert time.monotonic() < deadline_s, f"never {code} on the page: {self.text}"
            time.sleep(0.2)
        return value

    def wait_for(self, text: str) -> None:
        """Wait until the page shows a text."""
        self.wait(f"document.body && document.body.innerText.includes({json.dumps(text)})")

    def click(self, tag: str, text: str) -> None:
        """Click on the element of this tag whose text this is."""
        found = f"[...document.querySelectorAll({json.dumps(tag)})]"
        found += f".find(e => e.innerText == {json.dumps(text)})"
        self.wait(f"(e => e && !e.disabled && (e.click(), true))({found})")

    def type(self, selector: str, text: str) -> None:
        """Type into a field."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"(e => e && (e.focus(), true))({found})")
        self.insert(text)

    def insert(self, text: str) -> None:
        """Type where the cursor is, over what is selected there."""
        self._call("Input.insertText", text=text)

    def save(self, path: Path) -> None:
        """Write a picture of what is on the screen (PNG)."""
        told = self._call("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(told["result"]["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        return self._runner.run(self._answer(self._number, method, parameters))

    async def _answer(self, number: int, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:  # events come over the same line
            message = json.loads((await self._socket.receive(timeout=60)).data)
            if message.get("id") == number:
                return dict(message)


@contextmanager
def browser(width: int = 1400, height: int = 900) -> Iterator[Page]:
    """A browser with a new profile; ends with the block."""
    name = next(name for name in NAMES if shutil.which(name))
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        asyncio.Runner() as run,
    ):
        words = ["--headless=new", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0",
                 f"--window-size={width},{height}", f"--user-data-dir={profile}"]  # fmt: skip
        if os.geteuid() == 0:  # its sandbox wants another user
            words.append("--no-sandbox")
        process = subprocess.Popen(
            [name, *words, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        session = run.run(_session())
        try:
            yield Page(run, run.run(_connected(session, Path(profile), process)))
        finally:
            run.run(session.close())
            process.terminate()
            process.wait(30)


async def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession()


async def _connected(
    session: aiohttp.ClientSession, profile: Path, process: subprocess.Popen[bytes]
) -> aiohttp.ClientWebSocketResponse:
    port_file, deadline_s = profile / "DevToolsActivePort", time.monotonic() + 120
    while not port_file.is_file() or port_file.read_text().count("\n") < 1:
        assert process.poll() is None, "the browser has ended"
        assert time.monotonic() < deadline_s, "the browser does not start"
        await asyncio.sleep(0.1)
    port = port_file.read_text().splitlines()[0]
    async with session.get(f"http://127.0.0.1:{port}/json") as answer:
        tabs = await answer.json()
    address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
    return await session.ws_connect(address, max_msg_size=0)
