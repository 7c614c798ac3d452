"""Chromium with a feature browser of two SAEs; what must hold after each test that looks at a page."""

import json

import pytest
from selenium.webdriver.common.by import By

from gsae.features.browse.site import build_browser
from gsae.tests.support.browser_page import serving
from gsae.tests.support.browser_run import write_features
from gsae.tests.support.chromium import chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = chromium(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a browser of two SAEs, 100 and 70 latents."""
    run = tmp_path_factory.mktemp("served") / "run"
    write_features(run)
    write_features(run, "relu-w70", architecture="relu", d_sae=70)
    with serving(build_browser(run)) as url:
        yield url


@pytest.fixture
def assert_nothing_is_wrong_and_nothing_leaves(browser):
    """After every test: no error in the console, no request but to 127.0.0.1, and no text acted."""
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    yield
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:,", "about:blank"))] == []
    assert browser.title != "owned"
    assert browser.find_elements(By.CSS_SELECTOR, "img, iframe, [onerror]") == []
