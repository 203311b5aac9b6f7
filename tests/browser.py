"""A headless Chromium that tests drive as a person would: through its pipe, without another package.

with Browser(folder) as browser:
    browser.open(page)
    browser.click(300, 200)
    browser.ask("document.title")
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Pages may draw with WebGL, which a machine without a graphics card does in software.
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--remote-debugging-pipe", "--hide-scrollbars"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"),
)
PATIENCE = 300.0  # seconds, on a busy machine too


def program() -> str:
    """Where the browser is; a test without one is skipped."""
    found = next((place for name in NAMES if (place := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium on PATH: install the package `chromium` to open the page in a real browser")
    return found


class Browser:
    """One window of `width` x `height` pixels.

    Args:
        folder: for its profile.
    """

    def __init__(self, folder: Path, width: int = 1200, height: int = 800) -> None:
        self.to_browser, self.from_browser = os.pipe(), os.pipe()
        ends = (self.to_browser[0], self.from_browser[1])
        words = [program(), *OPTIONS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
        shell = f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}'  # the browser reads from 3 and writes to 4
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *words, "about:blank"], pass_fds=ends, stderr=subprocess.DEVNULL
        )
        for end in ends:
            os.close(end)
        self.number, self.rest, self.session = 0, b"", ""
        self.said: list[str] = []
        self.asked: list[str] = []
        pages = self.send("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{part}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for end in (self.to_browser[1], self.from_browser[0]):
            with contextlib.suppress(OSError):
                os.close(end)
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its answer."""
        self.number += 1
        content: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            content["sessionId"] = self.session
        os.write(self.to_browser[1], json.dumps(content).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == self.number:
                assert "error" not in message, (method, message)
                return message["result"]
            self._heard(message)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.from_browser[0], 1 << 20)
            assert part, "the browser ended"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        return json.loads(line)

    def _heard(self, message: dict[str, Any]) -> None:
        """Keep what the page complained of, and what it asked of the network."""
        kind, facts = message.get("method", ""), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            details = facts["exceptionDetails"]
            self.said.append(str(details.get("exception", {}).get("description") or details["text"]))
        elif kind == "Log.entryAdded" and facts["entry"]["level"] == "error":
            self.said.append(facts["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.asked.append(facts["request"]["url"])

    def open(self, page: Path) -> None:
        self.send("Page.navigate", url=page.resolve().as_uri())

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until an expression holds."""
        until = time.monotonic() + PATIENCE
        while not self.ask(f"Boolean({expression})"):
            late = time.monotonic() > until
            assert not late and not self.said, (expression, self.said, self.ask("document.body.innerText"))
            time.sleep(0.2)

    def mouse(self, kind: str, x: float, y: float, held: bool = False) -> None:
        pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, buttons=int(held), **pressed)

    def click(self, x: float, y: float) -> None:
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y, held=True)
        self.mouse("mouseReleased", x, y)

    def drag(self, start: tuple[float, float], end: tuple[float, float], steps: int = 4) -> None:
        self.mouse("mouseMoved", *start)
        self.mouse("mousePressed", *start, held=True)
        for i in range(1, steps + 1):
            at = [a + (b - a) * i / steps for a, b in zip(start, end)]
            self.mouse("mouseMoved", *at, held=True)
        self.mouse("mouseReleased", *end)

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
        return path
