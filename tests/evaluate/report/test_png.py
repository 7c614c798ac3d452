"""The plots as PNG files: one for each metric that the runs have, and the same bytes each time."""

import sys

import pytest

from gsae.errors import NotFoundError
from gsae.evaluate import write_plots
from gsae.evaluate.report.png import DENSITY
from gsae.evaluate.report.shown_metrics import METRICS
from gsae.tests.support.command import gsae
from gsae.tests.support.report_run import sweep, write_run

pytestmark = pytest.mark.slow

NAMES = {*(metric.png for metric in METRICS if metric.png), DENSITY}


def assert_png(file):
    """Assert that a file is a PNG; return its width and height."""
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


@pytest.mark.slow
def test_every_plot_is_written_at_the_size_of_a_column_and_the_same_twice(tmp_path):
    worse = [{**e, "explained_variance": e["explained_variance"] - 0.03, "site": "a $b$"} for e in sweep(seed=1)]
    runs = [write_run(tmp_path / "one", sweep()), write_run(tmp_path / "two", worse)]
    files = write_plots(runs, tmp_path / "png")
    assert {file.stem for file in files} == NAMES
    assert all(assert_png(file) == (1020, 798) for file in files)
    first = [file.read_bytes() for file in files]
    assert [file.read_bytes() for file in write_plots(runs, tmp_path / "png")] == first
    assert len(set(first)) == len(first)


@pytest.mark.slow
def test_without_the_language_model_its_plots_are_left_out(tmp_path):
    names = {file.stem for file in write_plots([write_run(tmp_path / "run", sweep(ce=False))], tmp_path / "png")}
    assert names == NAMES - {"loss-recovered", "kl-recovered"}


def test_the_command_writes_page_and_plots(tmp_path):
    run = write_run(tmp_path / "run", sweep()[:2])
    done = gsae("report", run, "--out", tmp_path / "report.html", "--png", tmp_path / "png")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "png" / "gamma.png") in done.stdout
    assert (tmp_path / "report.html").exists()


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(NotFoundError, match=r"pip install 'gsae\[plots\]'"):
        write_plots([write_run(tmp_path / "run", sweep())], tmp_path / "png")
