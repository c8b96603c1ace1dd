"""A real browser without a window, for pages: what it draws, what its console says, what it asks of a network.

It is Chromium, driven through its own protocol (the DevTools'), over the websocket that it opens for that.
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
START_S = 60.0
LOAD_S = 60.0


def executable() -> str:
    """The browser's program. Raises where there is none: a test of pages must not pass without."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise FileNotFoundError("no browser: apt-get install chromium")
    return found


@dataclass
class Page:
    """A page that is open: what its console said at the level of warnings and above, errors that its scripts didn't
    catch, and the addresses that it asked for."""

    connection: ClientConnection
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    loaded: bool = False

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The browser's answer to a command."""
        number = next(self.numbers)
        self.connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.connection.recv(timeout=LOAD_S))
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        method, told = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.asked.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.said.append(str(told["exceptionDetails"].get("exception", told["exceptionDetails"])))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.said.append(str(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.said.append(told["entry"]["text"])
        self.loaded |= method == "Page.loadEventFired"

    def go(self, address: str) -> None:
        """Open the address, and wait until all of it is loaded and its scripts have run."""
        self.loaded = False
        self.call("Page.navigate", url=address)
        end = time.monotonic() + LOAD_S
        while not self.loaded:
            assert time.monotonic() < end, f"{address} isn't loaded after {LOAD_S} s"
            self.evaluate("0")
            time.sleep(0.05)

    def evaluate(self, code: str) -> Any:
        """The value of a JavaScript expression, as plain JSON."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of the whole page."""
        options = {"captureBeyondViewport": True} if whole else {}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"])

    def pdf(self) -> bytes:
        """The page on paper."""
        printed = self.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(printed["data"])


@contextmanager
def browser() -> Iterator[int]:
    """A browser's port."""
    with tempfile.TemporaryDirectory() as home:
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        words += ["--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={home}/profile"]
        process = subprocess.Popen(
            [executable(), *words, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield _port(process, Path(home) / "profile" / "DevToolsActivePort")
        finally:
            process.terminate()
            process.wait(30)


def _port(process: subprocess.Popen[bytes], told: Path) -> int:
    end = time.monotonic() + START_S
    while not (told.exists() and told.read_text().strip()):
        assert process.poll() is None, f"the browser ended with code {process.returncode}"
        assert time.monotonic() < end, f"the browser hasn't started after {START_S} s"
        time.sleep(0.05)
    return int(told.read_text().split()[0])


@contextmanager
def opened(port: int, path: Path, *, dark: bool = False, size: tuple[int, int] = (1280, 900)) -> Iterator[Page]:
    """The file at `path`, open in the browser; `dark`: for who prefers dark pages; `size` in pixels."""
    with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
        target = next(t for t in json.load(answer) if t["type"] == "page")
    with connect(target["webSocketDebuggerUrl"], max_size=None) as connection:
        page = Page(connection)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.call("Emulation.setEmulatedMedia", features=scheme)
        page.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=False
        )
        page.go(path.resolve().as_uri())
        yield page
