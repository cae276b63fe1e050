"""A headless Chromium, driven by selenium, that records console messages and network requests."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
HARMLESS = ("Automatic fallback to software WebGL", "GL Driver Message")  # of a machine without a GPU


class Browser:
    """One browser for several pages.

    Args:
        profile: an empty folder.
    """

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS, f"--user-data-dir={profile}", "about:blank"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, file: Path, width: int = 1280, height: int = 800) -> None:
        """Open a page, and wait until its figures are drawn."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        self.driver.get(file.as_uri())
        self.wait("document.documentElement.dataset.ready === 'yes'")

    def command(self, name: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of an expression; a promise is awaited."""
        body = (
            f"const done = arguments[arguments.length - 1]; Promise.resolve({script}).then(done, e => done(String(e)))"
        )
        return self.driver.execute_async_script(body, *arguments)

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < until, f"never: {condition}"
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Messages of the console since the last call."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in messages if not any(part in message for part in HARMLESS)]

    def requests(self) -> list[str]:
        """Addresses requested since the last call, without data in the page itself and the browser's own pages."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("data:", "blob:", "chrome"))]

    def hover(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.command("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def quit(self) -> None:
        """End the browser."""
        self.driver.quit()
