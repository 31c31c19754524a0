"""Headless Chromium, driven over chromedriver's WebDriver protocol with the standard library."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --disable-extensions --hide-scrollbars --disable-dev-shm-usage"
).split()
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {
    "Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c", "Home": "\ue011", "End": "\ue010", "ArrowLeft": "\ue012",
    "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015",
}  # fmt: skip
WAIT_S = 20.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def missing_programs() -> list[str]:
    """Programs of Debian's packages chromium and chromium-driver that are not installed."""
    return [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]


class Browser:
    """One browser window. Methods return when the browser has done what was requested; errors of WebDriver raise."""

    def __init__(self, port: int, folder: Path) -> None:
        self._url = f"http://127.0.0.1:{port}"
        arguments = [*ARGUMENTS, f"--user-data-dir={folder}"]
        options = {"args": arguments, "binary": shutil.which("chromium")}
        capabilities = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with _OPENER.open(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{method} {path}: {json.load(error)['value']['message']}") from error

    def _post(self, path: str, **body: Any) -> Any:
        return self._call("POST", f"/session/{self._session}{path}", body)

    def close(self) -> None:
        """End the browser."""
        self._call("DELETE", f"/session/{self._session}")

    def open(self, page: Path, fragment: str = "", ready: str = "#app section") -> None:
        """Load a page from the start and wait until the selector ``ready`` finds an element."""
        self._post("/url", url="about:blank")
        self._post("/url", url=page.as_uri() + fragment)
        self.wait(lambda: self.count(ready))

    def resize(self, width: int, height: int = 1000) -> None:
        """Set the size of the page's area in CSS pixels."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._post("/goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params=metrics)

    def prefer(self, scheme: str) -> None:
        """Set the system's color scheme: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._post("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": features})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return the value of a script's ``return`` statement."""
        return self._post("/execute/sync", script=script, args=list(arguments))

    def count(self, selector: str) -> int:
        """Number of elements."""
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def text(self, selector: str) -> str:
        """Text content of the first element."""
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        """Text contents of all elements."""
        return list(self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector))

    def _find(self, selector: str) -> str:
        return str(self._post("/element", using="css selector", value=selector)[ELEMENT])

    def click(self, selector: str) -> None:
        """Click the first element with the mouse."""
        self._post(f"/element/{self._find(selector)}/click")

    def navigate(self, view: str) -> None:
        """Click the link of a view and wait until the view is visible: ``hashchange`` follows later than the click."""
        self.click(f"nav a[href='#{view}']")
        self.wait(lambda: self.count(f".view-{view}:not([hidden])"))

    def type(self, selector: str, text: str) -> None:
        """Replace the text of an input by keys."""
        element = self._find(selector)
        self._post(f"/element/{element}/clear")
        self._post(f"/element/{element}/value", text=text)

    def choose(self, selector: str, label: str) -> None:
        """Choose an option of a select element by its text."""
        script = """const [select, label] = [document.querySelector(arguments[0]), arguments[1]];
            select.value = [...select.options].find(option => option.text === label).value;
            select.dispatchEvent(new Event("change", {bubbles: true}))"""
        self.run(script, selector, label)

    def keys(self, *names: str) -> None:
        """Press keys one after another: names of KEYS or single characters."""
        presses = [{"type": kind, "value": KEYS.get(name, name)} for name in names for kind in ("keyDown", "keyUp")]
        self._post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": presses}])

    def hover(self, selector: str, dx: int = 0, dy: int = 0) -> None:
        """Move the mouse to the middle of the first element, and by an offset from there."""
        self._mouse({"type": "pointerMove", "duration": 0, "origin": {ELEMENT: self._find(selector)}, "x": dx, "y": dy})

    def drag(self, selector: str, dx: int) -> None:
        """Drag from the middle of the first element to the right."""
        start = {"type": "pointerMove", "duration": 0, "origin": {ELEMENT: self._find(selector)}, "x": 0, "y": 0}
        move = {"type": "pointerMove", "duration": 50, "origin": "pointer", "x": dx, "y": 0}
        self._mouse(start, {"type": "pointerDown", "button": 0}, move, {"type": "pointerUp", "button": 0})

    def _mouse(self, *actions: dict[str, Any]) -> None:
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": list(actions)}
        self._post("/actions", actions=[pointer])

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Return the condition's first true value."""
        deadline = time.monotonic() + WAIT_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not true in {WAIT_S} s; console: {self.console()}"
            time.sleep(0.02)
        return value

    def console(self) -> list[str]:
        """Messages of the console, errors and violations of the policy included, since the last call."""
        return [entry["message"] for entry in self._post("/se/log", type="browser")]

    def dialog(self) -> str | None:
        """Text of an open dialog."""
        with contextlib.suppress(AssertionError):
            return str(self._call("GET", f"/session/{self._session}/alert/text"))
        return None

    def screenshot(self, path: Path, complete: bool = False) -> None:
        """Write a PNG of the window, or of the complete page."""
        parameters: dict[str, Any] = {"captureBeyondViewport": complete}
        if complete:
            size = self.run("return [document.documentElement.clientWidth, document.documentElement.scrollHeight]")
            parameters |= {"clip": {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1}}
        image = self._post("/goog/cdp/execute", cmd="Page.captureScreenshot", params=parameters)["data"]
        path.write_bytes(base64.b64decode(image))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start chromedriver and a browser with an empty profile below ``folder``; end both afterwards."""
    with subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        try:
            window = Browser(_port(driver), folder / "profile")
            try:
                yield window
            finally:
                with contextlib.suppress(AssertionError, OSError):
                    window.close()
        finally:
            driver.terminate()


def _port(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout is not None
    for line in driver.stdout:
        if match := re.search(r"successfully on port (\d+)", line):
            return int(match[1])
    raise AssertionError("chromedriver did not start")
