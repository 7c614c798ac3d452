"""Headless Chromium as tests and benches drive it: a profile of its own, and nothing that calls home."""

import shutil
from pathlib import Path

import pytest
from selenium import webdriver

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
)


def chromium(profile: Path) -> webdriver.Chrome:
    """Start it, with logs of its console and its requests; `quit` ends it."""
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(program("chromedriver", "chromium-driver"))
    return webdriver.Chrome(options=options, service=service)


def program(*names: str) -> str:
    """Return the path of the first that is installed."""
    for name in names:
        if found := shutil.which(name):
            return found
    pytest.fail(f"{names[0]} is not installed, and pages must be seen: apt-get install -y chromium chromium-driver")


def sized(browser: webdriver.Chrome, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
    """Give the page a size, a phone's if narrow, and a colour scheme."""
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
