"""The browser in headless Chromium: it sorts, filters and shades, its addresses can be shared, and no text acts.

Where Chromium is missing these tests fail and say what to install: a page that nobody opened is not tested.
"""

import json
import re
import time

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from gsae.features.browse.site import build_browser
from gsae.tests.support.browser_page import address, heading, latents, opened, press, serving, texts, typed, until
from gsae.tests.support.browser_run import HOSTILE, ROWS, TEXTS, rows_fired_by, tokens_of, top_of, write_features

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("assert_nothing_is_wrong_and_nothing_leaves")]

# What a reader sees of HOSTILE where nothing is left unseen.
SEEN = (
    "</script><script>document.title='owned'</script>",
    "<img·src=x·onerror=\"document.title='owned'\">",
    "\"'&amp;`${1}",
    "U+202EgnpU+202C",
    "aU+200BbU+2060cU+FEFF",
    "U+0000U+001B[31mU+007FU+0085",
    "·⇥U+000D↵↵",
    "עברית",
    "◌\u0301\u0327x",
    "∅",
    "U+3164U+E0041",
    "__proto__",
)
MANY = 65_536
SORTED = [("rows", rows_fired_by), ("max", top_of), ("density", rows_fired_by), ("mean", top_of)]


# --- the table ---


@pytest.mark.parametrize(("column", "value"), SORTED)
def test_a_click_on_a_header_sorts_and_another_reverses_the_order(browser, served, column, value):
    opened(browser, served)
    head = f".head .{column}"
    alive = [latent for latent in range(100) if rows_fired_by(latent)]
    for direction, way in (("descending", -1), ("ascending", 1)):
        press(browser, f"{head} button")
        if column in ("max", "mean"):
            wanted = sorted(alive, key=lambda latent: (way * value(latent), latent))
        else:
            wanted = sorted(range(100), key=lambda latent: (way * value(latent), latent))
        found = latents(browser)
        assert found == wanted[: len(found)]
        assert len(found) > 20
        assert browser.find_element(By.CSS_SELECTOR, head).get_attribute("aria-sort") == direction
        short = {"descending": "desc", "ascending": "asc"}[direction]
        assert f"sort={column}&dir={short}" in address(browser)


def test_top_tokens_are_sorted_by_their_texts_and_the_dead_come_last(browser, served):
    opened(browser, f"{served}#/0?sort=token&show=alive")
    alive = [latent for latent in range(100) if rows_fired_by(latent)]
    found = latents(browser)
    assert found == sorted(alive, key=lambda latent: TEXTS[latent].encode("utf-16-be"))[: len(found)]
    opened(browser, f"{served}#/0?sort=max&dir=desc")
    browser.execute_script("const g = document.querySelector('.grid'); g.scrollTop = g.scrollHeight")
    until(browser, lambda: {*latents(browser)} >= {*range(4, 100, 5)})
    assert latents(browser)[-20:] == [*range(4, 100, 5)]


def test_filters_select_the_right_latents(browser, served):
    opened(browser, served)
    typed(browser, "find", "WORD4")
    wanted = [latent for latent in range(100) if rows_fired_by(latent) and "word4" in TEXTS[latent]]
    assert latents(browser) == wanted
    assert browser.find_element(By.CSS_SELECTOR, "output").text == f"{len(wanted)} of 100 latents"
    typed(browser, "find", "34")
    assert latents(browser) == [34]  # a latent's number, and dead
    typed(browser, "find", "")
    typed(browser, "low", "5")
    typed(browser, "high", "10")
    wanted = [latent for latent in range(100) if 0.05 <= rows_fired_by(latent) / ROWS <= 0.1]
    assert latents(browser) == wanted[: len(latents(browser))]
    assert browser.find_element(By.CSS_SELECTOR, "output").text == f"{len(wanted)} of 100 latents"
    typed(browser, "low", "")
    typed(browser, "high", "")
    Select(browser.find_element(By.CSS_SELECTOR, "[name=show]")).select_by_visible_text("dead")
    assert latents(browser) == [*range(4, 100, 5)]
    assert set(texts(browser, ".body .token-cell")) == {"dead"}
    typed(browser, "find", "nothing is like this")
    assert browser.find_element(By.CSS_SELECTOR, ".body").text == "No latent matches the filters."


def test_the_keyboard_goes_through_the_table_and_opens_a_latent(browser, served):
    opened(browser, served)
    grid = browser.find_element(By.CSS_SELECTOR, ".grid")
    grid.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    active = browser.find_element(By.ID, grid.get_attribute("aria-activedescendant"))
    assert active.get_attribute("data-latent") == "2"
    assert active.get_attribute("aria-rowindex") == "4"
    assert grid.get_attribute("aria-rowcount") == "101"
    grid.send_keys(Keys.END)
    assert latents(browser)[-1] == 99
    grid.send_keys(Keys.HOME, Keys.ARROW_DOWN, Keys.ENTER)
    until(browser, lambda: heading(browser) == ["Latent 1"])
    assert browser.switch_to.active_element.tag_name == "h1"


def test_65536_latents_are_there_sorted_and_filtered_at_once(browser, tmp_path):
    write_features(tmp_path)
    out = build_browser(tmp_path)
    index = json.loads((out / "data/index.json").read_text())
    index["saes"][0]["d_sae"] = MANY
    (out / "data/index.json").write_text(json.dumps(index))
    figures = [(1 + i * 7919 % 9973, i % 200) for i in range(MANY)]
    rows, tokens = zip(*figures, strict=True)
    values = [row / 7 for row in rows]
    table = {"rows": rows, "max": values, "mean": values, "top_token": tokens}
    (out / "data/0/table.json").write_text(json.dumps(table))
    with serving(out) as url:
        start = time.perf_counter()
        opened(browser, url)
        assert time.perf_counter() - start < 2
        assert len(browser.find_elements(By.CSS_SELECTOR, ".body .row")) < 60
        press(browser, ".head .rows button")
        top = sorted(range(MANY), key=lambda latent: (-rows[latent], latent))
        found = latents(browser)
        assert found == top[: len(found)]
        browser.find_element(By.CSS_SELECTOR, ".grid").send_keys(Keys.END)
        until(browser, lambda: latents(browser)[-1] == top[-1])
        assert latents(browser) == top[-len(latents(browser)) :]
        typed(browser, "find", "word77")
        assert browser.find_element(By.CSS_SELECTOR, "output").text == f"{tokens.count(89):,} of 65,536 latents"


# --- a latent ---


def test_a_latents_page_has_the_right_tokens_with_the_right_shades(browser, served):
    opened(browser, f"{served}#/0/f/7")
    assert texts(browser, ".examples h2") == [
        *("Where it fires most", f"Quantile 2 of 2, the strongest: {top_of(7) / 2:.3g} to {top_of(7):.3g}"),
        f"Quantile 1 of 2, the weakest: {top_of(7) / 10:.3g} to {top_of(7) / 2:.3g}",
    ]
    browser.execute_script("document.querySelectorAll('.more').forEach((button) => button.click())")
    examples = [(14, 1.0), (16, 0.8), (20, 0.6), (14, 0.2)]
    found = browser.find_elements(By.CSS_SELECTOR, ".example")
    assert len(found) == len(examples)
    for item, (context, share) in zip(found, examples, strict=True):
        tokens = item.find_elements(By.CSS_SELECTOR, ".text .token")
        seen = browser.execute_script("return arguments[0].map((t) => t.textContent)", tokens)
        assert seen[0] == SEEN[0]
        assert seen[2:12] == [*SEEN[2:12]]
        assert seen[12:] == [TEXTS[token] for token in tokens_of(context)[12:]]
        shades = browser.execute_script("return arguments[0].map((t) => t.style.getPropertyValue('--v'))", tokens)
        told = {at: float(shade) for at, shade in enumerate(shades) if shade}
        assert told == pytest.approx({3: share / 4, 27: share, 28: share / 2}, abs=2e-3)
        assert "peak" in tokens[27].get_attribute("class")


def test_shades_are_seen_and_grow_with_the_value(browser, served):
    opened(browser, f"{served}#/0/f/7")

    def colour(at):
        node = browser.find_element(By.CSS_SELECTOR, f".example:first-child [data-at='{at}']")
        found = browser.execute_script("return getComputedStyle(arguments[0]).backgroundColor", node)
        return float(re.findall(r"[\d.]+", found)[-1]) if "/" in found or "rgba" in found else 1.0

    assert colour(26) == 0 < colour(3) < colour(28) < colour(27)


def test_hovering_and_arrow_keys_show_values(browser, served):
    opened(browser, f"{served}#/0/f/7")
    tip = browser.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    token = browser.find_element(By.CSS_SELECTOR, ".example [data-at='28']")
    ActionChains(browser).scroll_to_element(token).move_to_element(token).perform()
    assert f"value\n{top_of(7) / 2:.4g}" in tip.text
    assert f"token id\n{tokens_of(14)[28]}" in tip.text
    text = browser.find_element(By.CSS_SELECTOR, ".text")
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    text.send_keys(Keys.ARROW_RIGHT)  # to where it fires most, and on from there
    assert f"value\n{top_of(7):.4g}" in tip.text
    for key, place, value in ((Keys.ARROW_RIGHT, 28, f"{top_of(7) / 2:.4g}"), (Keys.ARROW_RIGHT, 29, "–"),
                              (Keys.ARROW_LEFT, 28, f"{top_of(7) / 2:.4g}")):  # fmt: skip
        text.send_keys(key)
        assert f"value\n{value}" in tip.text
        assert f"position\n{place}" in tip.text
    text.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_histogram_logits_and_neighbours_show_the_features(browser, served):
    opened(browser, f"{served}#/0/f/23")
    titles = texts(browser, ".bin title")
    assert len(titles) == 10
    assert sum(int(title.split(": ")[1].split()[0].replace(",", "")) for title in titles) == rows_fired_by(23)
    assert texts(browser, ".promoted .chip") == [SEEN[0], TEXTS[23].replace(" ", "·")]
    assert texts(browser, ".promoted .value") == ["1.50", "0.500"]
    assert texts(browser, ".suppressed .chip") == [SEEN[1], SEEN[2]]
    assert texts(browser, ".suppressed .value") == ["−2.50", "−1.00"]
    assert texts(browser, ".neighbours a") == ["24", "25", "26"]
    assert texts(browser, ".neighbours .badge") == ["dead"]
    press(browser, ".neighbours a")
    until(browser, lambda: heading(browser) == ["Latent 24"])
    assert "fires on none of the 10,000 rows" in browser.find_element(By.CSS_SELECTOR, ".note.dead").text


def test_without_texts_and_logits_ids_are_shown(browser, tmp_path):
    write_features(tmp_path, words=False, logits=False)
    with serving(build_browser(tmp_path)) as url:
        opened(browser, f"{url}#/0?find=57")
        assert texts(browser, ".body .token-cell") == ["57"]
        opened(browser, f"{url}#/0/f/57")
        assert "Effects on logits need" in browser.find_element(By.CSS_SELECTOR, ".logits").text
        peak = browser.find_element(By.CSS_SELECTOR, ".peak")
        assert peak.text.strip() == str(tokens_of(2 * (57 % 40))[20 + 57 % 30])


# --- hostile texts ---


def test_hostile_texts_are_shown_whole_and_never_act(browser, served):
    opened(browser, served)
    for latent, seen in enumerate(SEEN):
        if rows_fired_by(latent):
            cell = f".row[data-latent='{latent}'] .token-cell"
            assert texts(browser, cell) == [seen]
    opened(browser, f"{served}#/0/f/0")
    assert texts(browser, ".tiles bdi") == [SEEN[0]]
    unseen = r"/[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/u"
    left = f"return document.body.textContent.replaceAll('\\n', '').match({unseen})"
    assert browser.execute_script(left) is None
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 1


def test_every_token_is_isolated_from_its_neighbours_direction(browser, served):
    opened(browser, f"{served}#/0/f/7")
    press(browser, ".more")
    said = """return [...document.querySelectorAll('.text .token')]
        .every((t) => t.localName === 'bdi' && getComputedStyle(t).unicodeBidi === 'isolate')"""
    assert browser.execute_script(said)


def test_hostile_addresses_and_names_are_shown_as_text(browser, tmp_path):
    name = "a<b onmouseover=alert(1)>\"'&amp;"
    write_features(tmp_path, name, architecture="__proto__", model=HOSTILE[0], dataset=HOSTILE[1])
    with serving(build_browser(tmp_path)) as url:
        opened(browser, f"{url}#/0?find=%3Cimg%20src%3Dx%3E&sort=__proto__&dir=%22", ".grid")
        assert browser.find_element(By.CSS_SELECTOR, "[name=find]").get_attribute("value") == "<img src=x>"
        facts = browser.find_element(By.CSS_SELECTOR, ".pane-head").text
        assert name in facts
        assert HOSTILE[0] in facts
        assert "__proto__" in facts
        for wrong in ("#/7", "#/x", "#/0/f/100", "#/0/f/-1", "#/0/f/", "#/compare/0/<b>"):
            opened(browser, f"{url}{wrong}", ".trouble")
            assert browser.find_element(By.CSS_SELECTOR, ".trouble").text.startswith("There is no")
