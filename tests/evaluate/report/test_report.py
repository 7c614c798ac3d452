"""The report as a file: complete, small, without network, the same every time, and it says what is missing."""

import base64
import hashlib
import json
import re
import shlex
import shutil

import pytest

from gsae.errors import CorruptError, NotFoundError, UsageError
from gsae.evaluate import evaluate, few_documents
from gsae.evaluate.report.curves import MAX_POINTS
from gsae.evaluate.report.pareto import SCORES
from gsae.evaluate.report.report import MAX_BYTES, report
from gsae.evaluate.report.runs import read_run
from gsae.tests.support.command import gsae
from gsae.tests.support.report_run import METRIC_LINES, sweep, write_run
from gsae.train import RunConfig, parse_sae, train

pytestmark = pytest.mark.slow

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028 & \"quotes\" 'too' {{data}} {{policy}} </title> `x`"


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", sweep())


def made(tmp_path, *runs):
    out = tmp_path / "out" / "report.html"
    report(runs, out)
    return out.read_bytes()


def data(html):
    (text,) = re.findall(rb'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


def test_the_data_in_the_page_is_what_the_files_hold(run, tmp_path):
    page = data(made(tmp_path, run))
    assert len(page["saes"]) == 10
    shown = {sae["name"]: sae for sae in page["saes"]}
    for written in sweep():
        for key in ("l0", "ce_loss_score", "explained_variance", "gamma", "gamma_centred", "mse", "dead"):
            assert shown[written["sae"]][key] == pytest.approx(written[key], rel=1e-5)
    assert [series["label"] for series in page["series"]] == ["Gated, 1,024 latents", "Baseline, 1,536 latents"]
    assert sorted(i for series in page["series"] for i in series["saes"]) == list(range(10))
    assert page["missing"] == []


def test_the_page_is_small_and_requests_nothing(run, tmp_path):
    html = made(tmp_path, run)
    assert len(html) < MAX_BYTES
    text = html.decode()
    assert not re.search(r"\b(?:src|href|action|srcset|poster)\s*=|@import|url\(\s*[^#)`]", text)
    assert set(re.findall(r"https?://[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_the_policy_allows_only_the_script_and_style_of_the_page(run, tmp_path):
    text = made(tmp_path, run).decode()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "innerHTML" not in text


def test_the_same_runs_give_the_same_bytes_in_any_folder(run, tmp_path):
    first = made(tmp_path, run)
    assert made(tmp_path, run) == first
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(run, moved)
    assert made(tmp_path, moved) == first


def test_hostile_names_come_back_as_text_and_never_as_markup(tmp_path):
    evaluations = [{**e, "sae": f"{HOSTILE} {i}", "site": HOSTILE} for i, e in enumerate(sweep())]
    html = made(tmp_path, write_run(tmp_path / "run", evaluations, model=HOSTILE, note=HOSTILE))
    assert b"onerror=alert(1)>" not in html
    assert html.count(b"</script>") == 2
    page = data(html)
    assert {sae["name"] for sae in page["saes"]} == {f"{HOSTILE} {i}" for i in range(10)}
    assert ["note", HOSTILE] in page["provenance"][0]["settings"]


def test_the_headline_and_the_paragraph_state_the_measured_values(run, tmp_path):
    page = data(made(tmp_path, run))
    assert page["headline"] == "Gated SAEs reach the baseline’s loss recovered with 2.5\xa0times fewer active latents"
    (paragraph,) = page["summary"]
    assert (
        "2.5 times as many active latents per token (L0) as the Gated SAEs at equal loss recovered (90\xa0%"
        in paragraph
    )
    assert "1.003 to 1.005 for Gated and 0.900 to 0.942 for the baseline" in paragraph
    assert "At a low, middle and high loss recovered (0.88, 0.91, 0.94) the ratio is 2.5, 2.5, 2.4." in paragraph
    assert "seed alone" not in paragraph
    assert "6,000 held-out rows" in paragraph
    assert "Intervals come from redrawing the 60 held-out documents. They do not cover the spread between" in paragraph
    assert page["tiles"][0]["note"].endswith("; 2.5, 2.5, 2.4 at low, middle, high scores")
    assert [tile["label"].rpartition(" equal ")[2] for tile in page["tiles"][:3]] == [
        *("loss recovered", "KL recovered", "explained variance")
    ]
    assert page["gaps"]["ce_loss_score"]["ratio"] == pytest.approx(2.5, rel=0.02)


def test_a_worse_or_undecided_gated_sae_is_not_praised(tmp_path):
    swapped = [{**e, "architecture": {"gated": "relu", "relu": "gated"}[e["architecture"]]} for e in sweep()]
    assert "2.5\xa0times more active latents" in data(made(tmp_path, write_run(tmp_path / "a", swapped)))["headline"]
    gated = [e for e in sweep() if e["architecture"] == "gated"]
    alike = [*gated, *({**e, "architecture": "relu", "sae": f"r{i}"} for i, e in enumerate(gated))]
    assert "about as many" in data(made(tmp_path, write_run(tmp_path / "b", alike)))["headline"]


def test_without_the_language_model_the_page_says_what_is_missing(tmp_path):
    page = data(made(tmp_path, write_run(tmp_path / "run", sweep(ce=False))))
    assert page["missing"][0].startswith("Loss recovered is missing: it needs the language model.")
    assert "explained variance" in page["headline"]
    assert all(sae["ce_loss_score"] is None for sae in page["saes"])


def test_each_seed_has_its_ratio_on_the_page_and_five_are_redrawn(tmp_path):
    def paragraph(seeds):
        found = [e for seed in range(seeds) for e in sweep(seed)]
        return data(made(tmp_path, write_run(tmp_path / str(seeds), found)))["summary"][0]

    two = paragraph(2)
    assert "each seed alone has 2.5 (seed 0) and 2.6 (seed 1)." in two
    assert "They do not cover the spread between fits (2 seeds here)." in two
    assert "redrawing the 60 held-out documents and the seeds." in paragraph(5)


@pytest.mark.parametrize(("documents", "said"), [(1, "1 held-out document:"), (49, "49 held-out documents:"), (50, "")])
def test_fewer_than_50_held_out_documents_are_said(tmp_path, documents, said):
    few = [{**e, "heldout_documents": documents} for e in sweep()]
    missing = data(made(tmp_path, write_run(tmp_path / "run", few)))["missing"]
    assert missing == [few_documents(documents)] if said else missing == []
    assert not said or missing[0].startswith(f"Only {said} intervals over documents are rough below 50; ")


def test_few_documents_that_ran_through_the_language_model_are_said(tmp_path):
    few = [{**e, "language_model": {"contexts": 9, "documents": 4}} for e in sweep()]
    (missing,) = data(made(tmp_path, write_run(tmp_path / "run", few)))["missing"]
    assert missing.startswith("Only 4 of 60 held-out documents ran through the language model: ")


def test_an_eval_json_of_an_older_version_is_shown_and_says_what_to_run(tmp_path):
    old = [{k: v for k, v in e.items() if k not in ("per_document", "heldout_documents")} for e in sweep()]
    page = data(made(tmp_path, write_run(tmp_path / "run", [{**e, "per_context": {"rows": [1]}} for e in old])))
    (missing,) = page["missing"]
    assert missing.startswith("The eval.json is of an older version: ")
    assert missing.endswith("Run `gsae eval RUN` again to add it.")
    assert page["tiles"][0]["note"].startswith("no interval; ")
    assert "Intervals" not in page["summary"][0]


def test_one_architecture_alone_has_no_ratio_but_a_report(tmp_path):
    page = data(made(tmp_path, write_run(tmp_path / "run", sweep()[:5])))
    assert page["gaps"] == dict.fromkeys(SCORES)
    assert "baseline curve has 0 usable points" in page["summary"][0]


def test_several_runs_are_shown_together_with_different_labels(tmp_path):
    runs = [write_run(tmp_path / at / "run", sweep(site=site)) for at, site in (("a", "mlp.10"), ("b", "resid.15"))]
    page = data(made(tmp_path, *runs))
    assert [series["label"] for series in page["series"]] == [
        *("Gated, mlp.10", "Baseline, mlp.10", "Gated, resid.15", "Baseline, resid.15")
    ]
    assert {sae["run"] for sae in page["saes"]} == {"run", "run (2)"}
    assert page["headline"].endswith("at 2 sites")
    assert len(page["summary"]) == 3


def test_no_absolute_path_and_no_user_reaches_the_page(run, tmp_path):
    note = "from '/home/someone/my texts/a.txt' and s3://bucket/x/y, see /home/someone/b/c.txt"
    config = run / "config.toml"
    config.write_text(f"note = {json.dumps(note)}\n{config.read_text()}".replace("note", "remark", 1))
    html = made(tmp_path, run)
    assert b"someone" not in html
    assert str(tmp_path).encode() not in html
    page = data(html)
    assert page["commands"][0].startswith("gsae train store --remark ")
    assert "s3://bucket/x/y" in dict(page["provenance"][0]["settings"])["remark"]


def test_provenance_names_store_model_text_and_settings(run, tmp_path):
    (provenance,) = data(made(tmp_path, run))["provenance"]
    facts = dict(provenance["facts"])
    assert facts["Store digest"] == "5f" * 32
    assert facts["Language model"] == "org/SmolLM2-135M"
    assert facts["Text"] == "builtin:pydoc"
    assert facts["gsae version"] == "0.1.0"
    assert facts["Held-out rows"] == "6,000"
    assert dict(provenance["settings"])["sae[0]"] == ("arch = gated, width = 1024, l1 = 0.06, lr = 0.001, seed = 0")


def test_the_commands_are_those_that_reproduce_the_report(run, tmp_path):
    train, evaluate, again = data(made(tmp_path, run))["commands"]
    words = shlex.split(train)
    assert words[:5] == ["gsae", "train", "store", "--site", "mlp.10"]
    assert words[words.index("--steps") + 1] == "2400"
    assert next(w for w in words if w.startswith("gated")) == "gated l1=0.06 lr=0.001 seed=0 width=1024"
    assert words.count("--sae") == 10
    assert words[-2:] == ["--out", "run"]
    assert evaluate == "gsae eval run"
    assert again == "gsae report run --out report.html"
    without = data(made(tmp_path, write_run(tmp_path / "bare", sweep(ce=False))))["commands"]
    assert without[1] == "gsae eval bare --no-model"


def test_a_real_run_is_retrained_by_its_command(tiny_store, tmp_path):
    settings = {"site": "mlp.1", "steps": 4, "batch_size": 64, "device": "cpu", "threads": 1}
    saes = parse_sae("gated width=32 l1=.1 seed=0,1") + parse_sae("relu width=48 l1=.125 lr=3e-4")
    train(tiny_store.site("mlp.1"), RunConfig(**settings, saes=saes), tmp_path / "run")
    evaluate(tmp_path / "run", tiny_store, None, None)
    words = shlex.split(data(made(tmp_path, tmp_path / "run"))["commands"][0])
    words[2], words[-1] = str(tiny_store.path), str(tmp_path / "again")
    done = gsae(*words[1:])
    assert done.returncode == 0, done.stderr
    for weights in (tmp_path / "run").glob("saes/*/sae_weights.safetensors"):
        again = tmp_path / "again" / weights.relative_to(tmp_path / "run")
        assert again.read_bytes() == weights.read_bytes()


def test_runs_of_different_stores_are_shown_with_a_warning(tmp_path):
    other = [{**e, "store_digest": "77" * 32} for e in sweep()]
    page = data(made(tmp_path, write_run(tmp_path / "a", sweep()), write_run(tmp_path / "b", other)))
    assert any("different stores" in text for text in page["missing"])
    assert len(page["summary"]) == 3
    assert {series["label"] for series in page["series"]} == {"Gated, a", "Baseline, a", "Gated, b", "Baseline, b"}


def test_seeds_span_a_band_and_one_seed_has_none(run, tmp_path):
    assert [series["bands"] for series in data(made(tmp_path, run))["series"]] == [{score: [] for score in SCORES}] * 2
    worse = [{**e, "explained_variance": e["explained_variance"] - 0.05} for e in sweep(seed=1)]
    page = data(made(tmp_path, write_run(tmp_path / "two", [*sweep(), *worse])))
    for series in page["series"]:
        spread = series["bands"]["explained_variance"]
        assert len(spread) >= 5
        assert all(high - low == pytest.approx(0.05, abs=1e-4) for _, low, high in spread)


def test_densities_and_standard_errors_reach_the_page(run, tmp_path):
    page = data(made(tmp_path, run))
    for written, shown in zip(sweep(), page["saes"], strict=True):
        counts = written["density"]["latents"]
        assert sum(share for _, share in shown["density"]) * written["d_sae"] == pytest.approx(sum(counts), rel=0.01)
        assert shown["errors"]["ce_loss_score"] == 0.02
    bare = [{k: v for k, v in e.items() if k not in ("density", "standard_errors", "kl_div_score")} for e in sweep()]
    old = data(made(tmp_path, write_run(tmp_path / "old", bare)))["saes"][0]
    assert old["density"] is old["kl_div_score"] is old["errors"]["l0"] is None


def test_curves_are_thinned_to_their_ends_and_even_steps_between(run, tmp_path):
    for curve in read_run(run).curves.values():
        assert len(curve.step) == MAX_POINTS < METRIC_LINES
        assert curve.step[0] == 0
        assert curve.step[-1] == (METRIC_LINES - 1) * 8
        assert list(curve.step) == sorted(set(curve.step))
    with (run / "metrics.jsonl").open("a") as metrics:  # far more lines than are ever kept, and a torn last one
        name = sweep()[0]["sae"]
        for step in range(METRIC_LINES, 5000):
            metrics.write(json.dumps({"step": step * 8, "sae": name, "l0": float(step)}) + "\n")
        metrics.write('{"step": 1, "sa')
    curve = read_run(run).curves[name]
    assert len(curve.step) == MAX_POINTS
    assert (curve.step[0], curve.step[-1]) == (0, 4999 * 8)
    assert max(b - a for a, b in zip(curve.step, curve.step[1:], strict=False)) < 600


def test_a_page_of_many_saes_is_still_under_1_mb(tmp_path):
    few = [{k: v for k, v in e.items() if k != "per_document"} for e in sweep()]
    many = [{**e, "sae": f"{e['sae']}-{i}"} for i in range(15) for e in few]
    html = made(tmp_path, write_run(tmp_path / "run", many))
    assert len(html) < MAX_BYTES
    assert 0 < len(data(html)["curves"][0]["step"]) < MAX_POINTS


def test_a_run_that_was_never_evaluated_names_the_command(run, tmp_path):
    kept = next(run.glob("saes/*/eval.json"))
    for file in run.glob("saes/*/eval.json"):
        if file != kept:
            file.unlink()
    assert "Not evaluated in run: " in data(made(tmp_path, run))["missing"][0]
    kept.unlink()
    with pytest.raises(NotFoundError, match=re.escape(f"`gsae eval {run}`")):
        report([run], tmp_path / "x.html")
    with pytest.raises(NotFoundError, match="is not a run"):
        report([tmp_path], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_files_that_do_not_parse_are_named_with_the_field(run, tmp_path):
    file = next(run.glob("saes/*/eval.json"))
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "l0": "many"}))
    with pytest.raises(CorruptError, match=r"eval\.json: l0: "):
        report([run], tmp_path / "x.html")
    file.write_text(json.dumps(good).replace(f'"l0": {good["l0"]}', '"l0": NaN', 1))
    assert None in {sae["l0"] for sae in data(made(tmp_path, run))["saes"]}
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(CorruptError, match="line 1"):
        report([run], tmp_path / "x.html")


def test_a_report_that_cannot_be_written_is_refused_and_leaves_nothing_behind(run, tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        report([run], tmp_path)
    (tmp_path / "file").write_text("old")
    with pytest.raises(UsageError):
        report([run], tmp_path / "file" / "report.html")
    assert (tmp_path / "file").read_text() == "old"
    assert not list(tmp_path.glob(".*.tmp"))
