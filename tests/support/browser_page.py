"""The feature browser in Chromium: how tests open its pages, wait for them, and read what they show."""

import threading
from contextlib import contextmanager

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from gsae.features.browse.serving import Server
from gsae.tests.support.chromium import sized


@contextmanager
def serving(folder, ratings=None):
    with Server(folder, ratings=ratings) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.url
        server.shutdown()


def opened(browser, url, wanted=".grid .row[data-latent], .feature-head", *, width=1280, height=900, dark=False):
    sized(browser, width=width, height=height, dark=dark)
    browser.get("about:blank")
    browser.get(url)
    until(browser, lambda: browser.find_elements(By.CSS_SELECTOR, wanted))


def until(browser, true):
    return WebDriverWait(browser, 20, poll_frequency=0.02).until(lambda b: true())


def latents(browser, pane=1):
    """The latents of the rows of the table that are in the page."""
    select = f".pane:nth-of-type({pane}) .body .row"
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((r) => Number(r.dataset.latent))", select
    )


def texts(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((n) => n.textContent)", selector
    )


def press(browser, selector):
    """Click: Chromium's history leaves out what a page did without a user's click."""
    browser.find_element(By.CSS_SELECTOR, selector).click()


def heading(browser):
    return texts(browser, "h1")


def address(browser):
    return browser.execute_script("return location.hash")


def typed(browser, name, text):
    field = browser.find_element(By.CSS_SELECTOR, f"input[name={name}]")
    field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.BACKSPACE, text)
