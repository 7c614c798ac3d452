"""A metric in the report is one entry of a list: table, definitions, CSV file and plot follow from it."""

import json
import re

import pytest

from gsae.evaluate import Evaluation, report, write_plots
from gsae.evaluate.report import html, page_data, png, shown_metrics
from gsae.evaluate.report.shown_metrics import METRICS, Metric
from gsae.tests.support.report_run import sweep, write_run


def test_every_shown_metric_is_a_field_of_eval_json():
    assert {metric.key for metric in METRICS} <= set(Evaluation.model_fields)
    assert len({metric.key for metric in METRICS}) == len(METRICS)


@pytest.mark.slow
def test_a_new_metric_is_one_entry(tmp_path, monkeypatch):
    more = (
        *METRICS,
        Metric("rows_skipped", "skipped", "short", "Skipped", "Rows left out.", "skipped", "rows left out"),
    )
    for module in (shown_metrics, page_data, png):
        monkeypatch.setattr(module, "METRICS", more)
    run = write_run(tmp_path / "run", sweep())
    report([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert '["rows_skipped", "skipped", short],' in text
    assert "<div><dt>Skipped</dt><dd>Rows left out.</dd></div>" in text
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert {sae["rows_skipped"] for sae in json.loads(data)["saes"]} == {3}
    assert "skipped" in {file.stem for file in write_plots([run], tmp_path / "png")}


def test_the_page_has_no_unfilled_placeholder(tmp_path):
    report([write_run(tmp_path / "run", sweep())], tmp_path / "report.html")
    assert "{{" not in (tmp_path / "report.html").read_text()
    assert html.SCRIPTS[0] == "data"
