"""A headless Chromium of this machine, for tests of pages and for their pictures."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
NEEDS = "needs chromium and chromedriver: apt-get install chromium chromium-driver"


def programs() -> tuple[str, str] | None:
    """Where the browser and its driver are, if both are there."""
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


@contextmanager
def chromium(width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """A browser of its own, with a fresh profile that goes away with it, which notes all that it asks for."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    found = programs()
    assert found, NEEDS
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = found[0]
        for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(found[1]))
        try:
            yield driver
        finally:
            driver.quit()


def asked_for(driver: Any) -> set[str]:
    """Addresses that pages have asked for since the last look, the browser's own inner ones left out."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    found = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    return {address for address in found if not address.startswith(("chrome", "data:", "blob:"))}


def text(driver: Any, name: str) -> str:
    """What an element shows."""
    return "".join(element.text for element in driver.find_elements("id", name))


def until(condition: Callable[[], Any], seconds: float = 90) -> Any:
    """What a condition comes to; fails when it does not come."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)
    return found
