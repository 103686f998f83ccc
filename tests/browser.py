"""A headless Chromium over its DevTools pipe, to see a page as a reader's browser does."""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)
LIMIT_S = 90


def installed():
    """Path of a browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One tab. Everything the page logs, throws or asks for is kept in ``events``."""

    def __init__(self, profile: Path) -> None:
        # Chromium reads commands from descriptor 3 and answers on 4; the shell puts them there.
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        command = [installed(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{high[0]} 4>&{high[1]}', *command],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*high, theirs_in, theirs_out):
            os.close(end)
        self._in, self._out, self._rest, self._number = ours_in, ours_out, b"", 0
        self.events: list[dict] = []
        try:
            target = self.call("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
            attached = {"targetId": target, "flatten": True}
            self._session = self.call("Target.attachToTarget", attached, session=None)["sessionId"]
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def open(self, page: Path) -> None:
        """Show a file and wait until all of it is loaded."""
        self.events.clear()
        self.call("Page.navigate", {"url": page.absolute().as_uri()})
        self._wait(lambda: any(event["method"] == "Page.loadEventFired" for event in self.events))

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """A screen of that many CSS pixels, of a reader who prefers light or dark."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str):
        """Value of a JavaScript expression in the page."""
        options = {"expression": script, "returnByValue": True, "awaitPromise": True}
        return self.call("Runtime.evaluate", options)["result"]["value"]

    def screenshot(self, path: Path) -> None:
        """PNG of the whole page."""
        shot = self.call("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(b64decode(shot["data"]))

    def call(self, method: str, parameters: dict | None = None, session: str | None = "own") -> dict:
        """Send a DevTools command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        answers: list[dict] = []
        self._wait(lambda: answers, answers)
        if "error" in answers[0]:
            raise RuntimeError(f"{method}: {answers[0]['error']}")
        return answers[0]["result"]

    def close(self) -> None:
        """End the browser and all its processes."""
        os.close(self._out)  # it ends when its pipe does
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)

    def _wait(self, done, answers: list[dict] | None = None) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not done():
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(self._in, 1 << 16) if ready else b""
            if not piece:
                raise TimeoutError("the browser ended" if ready else f"no answer in {LIMIT_S} s")
            *whole, self._rest = (self._rest + piece).split(b"\0")
            for text in whole:
                message = json.loads(text)
                if "method" in message:
                    self.events.append(message)
                elif answers is not None and message["id"] == self._number:
                    answers.append(message)


@contextlib.contextmanager
def browser(profile: Path):
    """A Browser that is closed in the end."""
    opened = Browser(profile)
    try:
        yield opened
    finally:
        opened.close()
