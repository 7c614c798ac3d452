"""The report in a real browser: points, hover, keyboard and sorting work, nothing is requested, nothing is injected.

Drives headless Chromium. Where it is missing these tests fail and say what to install: a report that nobody opened
is not tested.
"""

import csv
import json
import re

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from gsae.evaluate.report.report import report
from gsae.tests.support.chromium import chromium, sized
from gsae.tests.support.report_run import sweep, write_run

pytestmark = pytest.mark.browser
HOSTILE = "</script><img src=x onerror=document.title='owned'><b>bold</b> \"'&amp; __proto__"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = chromium(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


def opened(browser, html, *, width=1280, dark=False):
    """Load a report and return the addresses that it asked for."""
    sized(browser, width=width, dark=dark)
    browser.get_log("performance")
    browser.get(html.as_uri())
    WebDriverWait(browser, 20).until(lambda b: b.find_elements(By.CSS_SELECTOR, "#fig-gamma .dot"))
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report([write_run(folder / "run", sweep())], folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def shown(browser, page):
    opened(browser, page)
    return browser


def column(browser, header):
    heads = [h.text for h in browser.find_elements(By.CSS_SELECTOR, "#table thead th")]
    at = next(i for i, text in enumerate(heads) if text.replace("\n", " ").rstrip(" ↑↓") == header)
    return [
        row.find_elements(By.XPATH, "./*")[at].text for row in browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")
    ]


def test_it_requests_only_itself_and_logs_nothing(browser, page):
    assert opened(browser, page) == [page.as_uri()]
    assert browser.get_log("browser") == []


def test_every_plot_has_its_points_where_the_metrics_put_them(shown):
    for figure in ("fig-ce", "fig-ev", "fig-gamma"):
        assert len(shown.find_elements(By.CSS_SELECTOR, f"#{figure} .dot")) == 10
    assert len(shown.find_elements(By.CSS_SELECTOR, "#fig-curves .curve")) == 10
    places = {}
    for dot in shown.find_elements(By.CSS_SELECTOR, "#fig-ce .dot"):
        x, y = re.match(r"translate\(([\d.]+),([\d.]+)\)", dot.get_attribute("transform")).groups()
        places[dot.get_attribute("data-sae")] = (float(x), float(y))
    data = json.loads(shown.find_element(By.ID, "data").get_attribute("textContent"))
    saes = data["saes"]
    by_l0 = sorted(places, key=lambda i: saes[int(i)]["l0"])
    assert by_l0 == sorted(places, key=lambda i: places[i][0])
    by_score = sorted(places, key=lambda i: saes[int(i)]["ce_loss_score"])
    assert by_score == sorted(places, key=lambda i: -places[i][1])


def test_points_have_bars_where_the_errors_put_them(shown):
    data = json.loads(shown.find_element(By.ID, "data").get_attribute("textContent"))
    upright = [b.get_attribute("d") for b in shown.find_elements(By.CSS_SELECTOR, "#fig-ce .bar")]
    spans = [re.match(r"M([\d.]+),([\d.]+)V([\d.]+)", d) for d in upright]
    spans = [tuple(map(float, m.groups())) for m in spans if m]
    assert len(spans) == 10
    dots = {d.get_attribute("data-sae"): d for d in shown.find_elements(By.CSS_SELECTOR, "#fig-ce .dot")}
    places = [re.match(r"translate\(([\d.]+),([\d.]+)\)", d.get_attribute("transform")).groups() for d in dots.values()]
    scores = [data["saes"][int(i)]["ce_loss_score"] for i in dots]
    ys = [float(y) for _, y in places]
    a_unit = (max(ys) - min(ys)) / (max(scores) - min(scores))
    for x, top, bottom in spans:
        assert bottom - top == pytest.approx(2 * 1.96 * 0.02 * a_unit, rel=0.02)
        assert min(abs(float(px) - x) + abs(float(py) - (top + bottom) / 2) for px, py in places) < 0.2


def test_idle_latents_and_densities_are_drawn_and_can_be_chosen(shown):
    assert len(shown.find_elements(By.CSS_SELECTOR, "#fig-idle .dot")) == 10
    heard = [d.get_attribute("aria-label") for d in shown.find_elements(By.CSS_SELECTOR, "#fig-idle .dot")]
    assert all(re.search(r"dead latents [\d.]+ %$", h) for h in heard)
    Select(shown.find_element(By.CSS_SELECTOR, "#fig-idle select")).select_by_visible_text("dense latents")
    assert "dense latents (%)" in shown.find_element(By.ID, "fig-idle").text
    lines = shown.find_elements(By.CSS_SELECTOR, "#fig-density .curve")
    assert len(lines) == 10
    assert re.search(r"fire on about [\d.e-]+ % of rows, latents [\d.]+ %$", lines[0].get_attribute("aria-label"))
    Select(shown.find_element(By.CSS_SELECTOR, "#fig-density select")).select_by_visible_text("Baseline, 1,536 latents")
    assert len(shown.find_elements(By.CSS_SELECTOR, "#fig-density .curve")) == 5
    assert shown.get_log("browser") == []


def test_the_table_is_downloaded_as_csv_in_the_order_shown(browser, tmp_path):
    evaluations = sweep()
    evaluations[3]["sae"] = '=cmd|" /C calc"!A0'
    report([write_run(tmp_path / "run", evaluations)], tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    browser.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    button = browser.find_element(By.XPATH, "//thead//button[text()='L0']")
    browser.execute_script("arguments[0].click()", button)
    browser.execute_script("arguments[0].click()", browser.find_element(By.ID, "csv"))
    file = tmp_path / "gsae-report.csv"
    WebDriverWait(browser, 20).until(lambda b: file.exists() and file.stat().st_size)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 10
    l0 = [float(row["l0"]) for row in rows]
    assert l0 == sorted(l0)
    by_name = {row["name"]: row for row in rows}
    for written in evaluations:
        row = by_name.get(written["sae"]) or by_name["'" + written["sae"]]
        for key in ("l0", "ce_loss_score", "kl_div_score", "gamma", "l2_ratio"):
            assert float(row[key]) == pytest.approx(written[key], rel=1e-5)
        assert float(row["gamma_standard_error"]) == 0.002
    assert '\'=cmd|" /C calc"!A0' in by_name
    assert browser.get_log("browser") == []


def test_several_runs_are_drawn_together_and_lines_can_be_hidden(browser, tmp_path):
    kinds = ("gated-untied", "rescale-shift")
    more = [{**e, "architecture": kind, "sae": f"{kind}-{i}"} for kind in kinds for i, e in enumerate(sweep()[:5])]
    worse = [{**e, "explained_variance": e["explained_variance"] - 0.03} for e in sweep(seed=1)]
    runs = [
        write_run(tmp_path / "a", [*sweep(), *worse, *more]),
        write_run(tmp_path / "b", sweep(site="resid.15")),
    ]
    report(runs, tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    boxes = browser.find_elements(By.CSS_SELECTOR, "#lines label")
    assert {b.text for b in boxes} == {
        *("Gated, mlp.10", "Baseline, mlp.10", "Gated, resid.15", "Baseline, resid.15"),
        *("Gated, untied encoders, mlp.10", "Baseline, rescaled and shifted, mlp.10"),
    }
    colours = {
        browser.execute_script("return getComputedStyle(arguments[0]).getPropertyValue('--c')", b) for b in boxes
    }
    assert len(colours) == 6
    assert len(browser.find_elements(By.CSS_SELECTOR, "#fig-ev .band")) == 2
    assert len(browser.find_elements(By.CSS_SELECTOR, "#fig-ev .dot")) == 40
    for box in boxes:
        if "Gated, mlp.10" not in box.text:
            browser.execute_script("arguments[0].click()", box.find_element(By.TAG_NAME, "input"))
    assert len(browser.find_elements(By.CSS_SELECTOR, "#fig-ev .dot")) == 10
    assert len(browser.find_elements(By.CSS_SELECTOR, "#fig-density .curve")) == 10
    assert len(browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")) == 40
    browser.execute_script("arguments[0].click()", boxes[0].find_element(By.TAG_NAME, "input"))
    assert "None of the shown SAEs" in browser.find_element(By.ID, "fig-curves").text
    assert browser.get_log("browser") == []


def test_axes_lines_and_the_ratio_are_labelled(shown):
    text = shown.find_element(By.ID, "fig-ce").text
    for words in ("L0: active latents per token", "loss recovered", "Gated, 1,024", "Baseline, 1,536", "2.5×"):
        assert words in text
    assert "no shrinkage" in shown.find_element(By.ID, "fig-gamma").text


def test_hovering_shows_the_sae_and_highlights_it_everywhere(shown):
    dot = shown.find_element(By.CSS_SELECTOR, "#fig-ce .dot[data-sae='2']")
    tip = shown.find_element(By.ID, "tip")
    assert not tip.is_displayed()
    ActionChains(shown).scroll_to_element(dot).move_to_element(dot).perform()
    assert tip.is_displayed()
    assert tip.text.startswith("gated-w1024-l1_0.17-seed0")
    assert "0.17" in tip.text
    lit = shown.find_elements(By.CSS_SELECTOR, ".on[data-sae='2']")
    assert {e.tag_name for e in lit} >= {"g", "path", "tr"}
    ActionChains(shown).move_to_element(shown.find_element(By.ID, "table-title")).perform()
    assert not tip.is_displayed()


def test_the_keyboard_reaches_every_point_and_its_label_has_its_values(shown):
    dots = shown.find_elements(By.CSS_SELECTOR, "#fig-ce .dot")
    assert [d.get_attribute("tabindex") for d in dots].count("0") == 1
    shown.execute_script("arguments[0].focus()", dots[0])
    heard = []
    for _ in dots:
        focused = shown.switch_to.active_element
        heard.append(focused.get_attribute("aria-label"))
        focused.send_keys(Keys.ARROW_RIGHT)
    assert len(set(heard)) == 10
    assert all(re.search(r"latents, λ \(L1\) [\d.]+, seed 0, L0 [\d.]+, loss recovered 0\.\d{3}$", h) for h in heard)
    assert shown.find_element(By.ID, "tip").is_displayed()
    shown.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not shown.find_element(By.ID, "tip").is_displayed()


def test_headers_sort_the_table_both_ways(shown):
    button = shown.find_element(By.XPATH, "//thead//button[text()='L0']")
    for direction, reverse in (("ascending", False), ("descending", True)):
        shown.execute_script("arguments[0].click()", button)
        figures = [float(text.replace(",", "")) for text in column(shown, "L0")]
        assert figures == sorted(figures, reverse=reverse)
        assert len(figures) == 10
        assert button.find_element(By.XPATH, "..").get_attribute("aria-sort") == direction
    shown.execute_script("arguments[0].click()", shown.find_element(By.XPATH, "//thead//button[text()='SAE']"))
    assert column(shown, "SAE")[0] == "gated-w1024-l1_0.06-seed0"
    assert column(shown, "SAE")[-1] == "relu-w1536-l1_0.25-seed0"


def test_another_metric_can_be_chosen(shown):
    select = Select(shown.find_element(By.CSS_SELECTOR, "#fig-curves select"))
    assert [o.text for o in select.options] == ["L0", "explained variance", "gamma", "dead latents", "loss"]
    seen = set()
    for option in [o.text for o in select.options]:
        select.select_by_visible_text(option)
        assert len(shown.find_elements(By.CSS_SELECTOR, "#fig-curves .curve")) == 10
        seen.add(shown.find_element(By.CSS_SELECTOR, "#fig-curves .curve").get_attribute("d"))
    assert len(seen) == 5
    assert shown.get_log("browser") == []


def test_hostile_names_are_shown_and_never_act(browser, tmp_path):
    evaluations = [{**e, "sae": f"{HOSTILE} {i}", "site": HOSTILE} for i, e in enumerate(sweep())]
    evaluations[0]["architecture"] = "__proto__"
    run = write_run(tmp_path / "run", evaluations, model=HOSTILE, note=HOSTILE)
    report([run], tmp_path / "report.html")
    asked = opened(browser, tmp_path / "report.html")
    assert asked == [(tmp_path / "report.html").as_uri()]
    assert browser.get_log("browser") == []
    assert browser.find_elements(By.CSS_SELECTOR, "img, b") == []
    assert browser.title != "owned"
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2
    assert set(column(browser, "SAE")) == {f"{HOSTILE} {i}" for i in range(10)}
    assert HOSTILE in browser.find_element(By.ID, "kicker").text
    dot = browser.find_element(By.CSS_SELECTOR, "#fig-ce .dot[data-sae='3']")
    ActionChains(browser).scroll_to_element(dot).move_to_element(dot).perform()
    assert HOSTILE in browser.find_element(By.ID, "tip").text


def test_without_the_language_model_a_reason_replaces_the_plot(browser, tmp_path):
    report([write_run(tmp_path / "run", sweep(ce=False))], tmp_path / "report.html")
    opened(browser, tmp_path / "report.html")
    assert "needs the language model" in browser.find_element(By.CSS_SELECTOR, "#fig-ce .plot").text
    assert browser.find_elements(By.CSS_SELECTOR, "#fig-ce .dot") == []
    assert len(browser.find_elements(By.CSS_SELECTOR, "#fig-ev .dot")) == 10
    assert set(column(browser, "loss recovered")) == {"–"}
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_on_a_phone_and_the_dark_page_is_dark(browser, page, width, dark):
    opened(browser, page, width=width, dark=dark)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    outside = """const out = (box) => box.left < 0 || box.right > innerWidth;
        return [...document.querySelectorAll(".plot text")].filter((t) => out(t.getBoundingClientRect())).length"""
    assert browser.execute_script(outside) == 0
    ink, paper = (
        browser.execute_script(f"return getComputedStyle(document.body)['{name}']")
        for name in ("color", "backgroundColor")
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (light[0] > light[1]) is dark
