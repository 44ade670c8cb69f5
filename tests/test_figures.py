"""The page and the figures of a run: what they show is what the run scored, in a real browser and on real pixels."""
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """A headless Chromium, driven over a pipe by the DevTools protocol: real keys, pointers, themes and pixels."""

    def __init__(self):
        self.folder, self.calls = tempfile.mkdtemp(), 0
        (theirs_in, self.send), (self.receive, theirs_out) = os.pipe(), os.pipe()
        script = f"exec {CHROME} {' '.join(self.flags())} 3<&{theirs_in} 4>&{theirs_out}"
        self.process = subprocess.Popen(["bash", "-c", script], pass_fds=(theirs_in, theirs_out),
                                        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self.buffer, self.session = b"", None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.errors = []
        self("Runtime.enable"), self("Page.enable"), self("Network.enable")

    def flags(self) -> list[str]:
        return ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars",
                "--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={self.folder}"]

    def __call__(self, method: str, **params) -> dict:
        """The result of one call; errors and requests that happen meanwhile are kept in `errors`."""
        self.calls += 1
        session = dict(sessionId=self.session) if self.session else {}
        os.write(self.send, json.dumps(dict(id=self.calls, method=method, params=params, **session)).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                self.buffer += os.read(self.receive, 1 << 20)
            message, _, self.buffer = self.buffer.partition(b"\0")
            message = json.loads(message)
            if message.get("id") == self.calls:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"])
            if message.get("method") == "Network.requestWillBeSent":
                self.errors.append(message["params"]["request"]["url"])

    def open(self, url: str, width: int = 1200, height: int = 800, theme: str = "light") -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value=theme),
                                                     dict(name="prefers-reduced-motion", value="reduce")])
        self("Page.navigate", url="about:blank")
        self.errors.clear()
        self("Page.navigate", url=url)
        end = time.monotonic() + 10
        while time.monotonic() < end and self.js("document.readyState + location.protocol") != "completefile:":
            time.sleep(0.02)
        self.errors = [e for e in self.errors if not str(e).startswith(("file:", "about:"))]

    def js(self, expression: str):
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def key(self, key: str) -> None:
        shift = 8 if len(key) == 1 and key.isupper() else 0
        text = dict(text=key) if len(key) == 1 else {}
        self("Input.dispatchKeyEvent", type="keyDown", key=key, modifiers=shift, **text)
        self("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=shift)

    def point(self, selector: str, press: bool = False) -> None:
        """Move the pointer over an element, and click there with `press`."""
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector({selector!r})"
                       ".getClientRects()[0])")
        for kind in ("mouseMoved", *(["mousePressed", "mouseReleased"] if press else [])):
            button = "none" if kind == "mouseMoved" else "left"
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=int(press))

    def screenshot(self, path: Path) -> Path:
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))
        return path

    def close(self) -> None:
        os.close(self.send)
        self.process.wait(10)
        os.close(self.receive)
        shutil.rmtree(self.folder, ignore_errors=True)
