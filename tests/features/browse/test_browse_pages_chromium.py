"""The browser in headless Chromium: its addresses and history, its layout, and the blind comparison.

Where Chromium is missing these tests fail and say what to install: a page that nobody opened is not tested.
"""

import re

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

from gsae.features import BlindSettings, build_blind, compare_ratings, ratings_of
from gsae.features.browse.blind_key import read_key
from gsae.features.browse.site import build_browser
from gsae.tests.support.browser_page import heading, latents, opened, press, serving, texts, typed, until
from gsae.tests.support.browser_run import rows_fired_by, top_of, write_features

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("assert_nothing_is_wrong_and_nothing_leaves")]


# --- addresses ---


def test_back_and_forward_follow_the_history(browser, served):
    opened(browser, served)
    press(browser, ".head .max button")
    sorted_ = latents(browser)
    press(browser, f".row[data-latent='{sorted_[2]}'] a")
    until(browser, lambda: heading(browser) == [f"Latent {sorted_[2]}"])
    press(browser, ".neighbours a")
    until(browser, lambda: heading(browser) == [f"Latent {sorted_[2] + 1}"])
    browser.back()
    until(browser, lambda: heading(browser) == [f"Latent {sorted_[2]}"])
    browser.back()
    until(browser, lambda: latents(browser) == sorted_)
    browser.back()
    until(browser, lambda: latents(browser)[:3] == [0, 1, 2])
    browser.forward()
    until(browser, lambda: latents(browser) == sorted_)
    browser.forward()
    until(browser, lambda: heading(browser) == [f"Latent {sorted_[2]}"])
    press(browser, ".feature-head .back")
    until(browser, lambda: latents(browser) == sorted_)


def test_going_back_restores_the_scroll_position(browser, served):
    opened(browser, served)
    browser.execute_script("document.querySelector('.grid').scrollTop = 1600")
    until(browser, lambda: 60 in latents(browser))
    press(browser, ".row[data-latent='60'] a")
    until(browser, lambda: heading(browser) == ["Latent 60"])
    browser.back()
    until(browser, lambda: 60 in latents(browser))
    assert browser.execute_script("return document.querySelector('.grid').scrollTop") == 1600


def test_an_address_opens_the_same_thing_elsewhere(browser, served):
    opened(browser, served)
    typed(browser, "find", "word")
    Select(browser.find_element(By.CSS_SELECTOR, "[name=show]")).select_by_visible_text("alive")
    press(browser, ".head .rows button")
    before, shared = latents(browser), browser.current_url
    opened(browser, shared)
    assert latents(browser) == before
    assert browser.find_element(By.CSS_SELECTOR, "[name=find]").get_attribute("value") == "word"
    opened(browser, f"{served}#/1/f/61")
    assert heading(browser) == ["Latent 61"]
    assert browser.title == "latent 61, relu-w70 – gsae browse"


def test_two_saes_side_by_side_are_independent(browser, served):
    opened(browser, f"{served}#/compare/0/1?a.f=7&b.sort=max&b.dir=desc", ".pane:nth-of-type(2) .body .row")
    until(browser, lambda: heading(browser) == ["Latent 7"])
    right = sorted(
        (latent for latent in range(70) if rows_fired_by(latent)), key=lambda latent: (-top_of(latent), latent)
    )
    found = latents(browser, 2)
    assert found == right[: len(found)]
    press(browser, f".row[data-latent='{right[1]}'] a")
    until(browser, lambda: heading(browser) == ["Latent 7", f"Latent {right[1]}"])
    press(browser, ".pane:nth-of-type(1) .neighbours a")  # made before the other pane changed
    until(browser, lambda: heading(browser) == ["Latent 8", f"Latent {right[1]}"])
    shared = browser.current_url
    opened(browser, shared, ".pane:nth-of-type(2) .feature-head")
    until(browser, lambda: heading(browser) == ["Latent 8", f"Latent {right[1]}"])
    assert browser.title == f"latent 8, gated-w100 and latent {right[1]}, relu-w70 – gsae browse"


# --- the page ---


@pytest.mark.parametrize("where", ["#/0", "#/0/f/7", "#/compare/0/1?a.f=7"])
@pytest.mark.parametrize(("width", "dark"), [(360, False), (360, True), (1280, True)])
def test_nothing_sticks_out_on_a_phone_and_the_dark_page_is_dark(browser, served, where, width, dark):
    opened(browser, f"{served}{where}", width=width, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ink, paper = (
        sum(map(int, re.findall(r"\d+", browser.execute_script(f"return getComputedStyle(document.body).{name}"))[:3]))
        for name in ("color", "backgroundColor")
    )
    assert (ink > paper) is dark


def test_a_missing_shard_is_named_and_can_be_tried_again(browser, tmp_path):
    write_features(tmp_path)
    out = build_browser(tmp_path)
    shard = out / "data/0/latents/00001.json"
    kept = shard.read_bytes()
    shard.unlink()
    with serving(out) as url:
        opened(browser, f"{url}#/0/f/40", ".trouble")
        assert (
            "data/0/latents/00001.json: the server answers 404."
            in browser.find_element(By.CSS_SELECTOR, ".trouble").text
        )
        assert [entry for entry in browser.get_log("browser") if "404" not in entry["message"]] == []
        shard.write_bytes(kept)
        press(browser, ".trouble button")
        until(browser, lambda: heading(browser) == ["Latent 40"])


# --- blind ---


def test_a_blind_reader_sees_no_names_and_can_continue_later(browser, tmp_path):
    write_features(tmp_path / "run")
    write_features(tmp_path / "run", "relu-w70", architecture="relu", d_sae=70)
    blind = build_blind(tmp_path / "run", (), tmp_path / "blind", BlindSettings(pairs=3, seed=5))
    trials = read_key(blind).trials
    with serving(blind / "site", ratings_of(blind)) as url:
        opened(browser, url, ".judge")
        assert heading(browser) == ["Trial 1 of 6"]
        for done, key in enumerate("123n"):
            assert f"{done} of 6 rated" in browser.find_element(By.CSS_SELECTOR, ".saved").text
            browser.find_element(By.TAG_NAME, "body").send_keys(key)
            until(browser, lambda done=done: heading(browser) == [f"Trial {done + 2} of 6"])
            page = browser.execute_script("return document.documentElement.outerHTML")
            assert not re.search(r"gated|relu|latent|fires on \d", page, re.IGNORECASE)
        browser.back()
        until(browser, lambda: heading(browser) == ["Trial 4 of 6"])
        assert browser.find_element(By.CSS_SELECTOR, "[aria-pressed=true]").text.startswith("no")
    with serving(blind / "site", ratings_of(blind)) as url:
        opened(browser, url, ".judge")
        assert heading(browser) == ["Trial 5 of 6"]
        press(browser, ".ratings button:nth-child(3)")
        until(browser, lambda: heading(browser) == ["Trial 6 of 6"])
        press(browser, ".ratings button:nth-child(2)")
        until(browser, lambda: "All 6 are rated" in texts(browser, ".saved")[0])
    said = dict(zip(trials, (0, 1, 2, 0, 2, 1), strict=True))
    found = compare_ratings(blind)
    for n, name in enumerate(("gated-w100", "relu-w70")):
        mine = [rating for trial, rating in said.items() if trial.sae == n]
        assert [*found["counts"][name].values()] == [mine.count(rating) for rating in range(3)]
