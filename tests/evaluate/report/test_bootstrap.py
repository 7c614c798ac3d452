"""The interval of the L0 ratio: a plain loop over the same draws, a known variance, and what it is not given for."""

import numpy as np
import pytest

from gsae.evaluate import Evaluation
from gsae.evaluate.report.bootstrap import bootstrap, redrawn_seeds
from gsae.evaluate.report.comparison import compare, summary
from gsae.evaluate.report.pareto import SCORES, Point, l0_ratio
from gsae.evaluate.report.seed_means import Curve
from gsae.tests.support.report_run import DOCUMENTS, sweep

COLUMNS = {
    "ce_loss_score": ("spliced", "clean", "zero"),
    "kl_div_score": ("kl_spliced", None, "kl_zero"),
    "explained_variance": ("sse", None, "sst"),
}


def typed(evaluations):
    return [Evaluation.model_validate(e) for e in evaluations]


def curves(evaluations):
    """The Gated and the baseline curve."""
    return [Curve.of(e for e in typed(evaluations) if e.architecture == kind) for kind in ("gated", "relu")]


def changed(evaluations, change):
    """The SAEs with the sums that `change` makes of each one's."""
    return [{**e, "per_document": change(e["per_document"])} for e in evaluations]


def plain_loop(evaluations, score, resamples, seed, seeds=None):
    """Ratios of some redraws in plain Python; seeds: those that are redrawn, None for none."""
    documents = len(evaluations[0]["per_document"]["rows"])
    words = np.random.Philox(key=np.array([seed, 0], np.uint64))
    seed_words = np.random.Philox(key=np.array([seed, 1], np.uint64))
    spliced, clean, zero = COLUMNS[score]
    ratios = []
    for _ in range(resamples):
        picked = [int(word) % documents for word in words.random_raw(documents)]
        drawn = None if seeds is None else [seeds[int(word) % len(seeds)] for word in seed_words.random_raw(len(seeds))]
        points = {}
        for e in evaluations:
            sums = e["per_document"]
            total = {name: sum(sums[name][d] for d in picked) for name in ("rows", "l0", spliced, zero)}
            base = sum(sums[clean][d] for d in picked) if clean else 0.0
            of = Point(total["l0"] / total["rows"], 1 - (total[spliced] - base) / (total[zero] - base))
            setting = (e["architecture"], e["d_sae"], e["l1_coefficient"], e["lr"])
            times = 1 if drawn is None else drawn.count(e["seed"])
            points.setdefault(setting, []).extend([of] * times)
        means = {"gated": [], "relu": []}
        for (architecture, *_), own in points.items():
            l0, value = (sum(getattr(point, key) for point in own) / len(own) for key in ("l0", "score"))
            means[architecture].append(Point(l0, value))
        ratios.append(l0_ratio(means["gated"], means["relu"]).value)
    return ratios


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_the_interval_equals_a_plain_loop_over_the_same_draws(score, seeds):
    every = [e for seed in range(seeds) for e in sweep(seed)]
    expected = plain_loop(every, score, 40, 3, list(range(5)) if seeds == 5 else None)
    interval = bootstrap(*curves(every), score, resamples=40, seed=3)
    assert interval is not None
    found = [interval.low, interval.middle, interval.high]
    assert found == pytest.approx(np.quantile(expected, [0.05, 0.5, 0.95]).tolist(), rel=1e-12)
    assert interval.defined == 1
    assert interval.seeds == (seeds == 5)


def test_the_interval_contains_the_ratio_and_follows_from_the_seed_alone():
    gated, baseline = curves(sweep())
    found = bootstrap(gated, baseline, "ce_loss_score")
    assert found is not None
    assert found.low < compare(typed(sweep()), "ce_loss_score").ratio.value < found.high
    assert found.high - found.low > 0.05
    assert found == bootstrap(gated, baseline, "ce_loss_score")
    assert found == bootstrap(*curves(sweep()[::-1]), "ce_loss_score")
    assert found != bootstrap(gated, baseline, "ce_loss_score", seed=1)


def test_blocks_of_redraws_do_not_change_them(monkeypatch):
    every = [e for seed in range(5) for e in sweep(seed)]
    whole = bootstrap(*curves(every), "kl_div_score", resamples=30)
    monkeypatch.setitem(bootstrap.__globals__, "BLOCK", 7 * DOCUMENTS)
    assert bootstrap(*curves(every), "kl_div_score", resamples=30) == whole


def flat(l0, score, documents, off):
    """Sums of an SAE whose L0 in document d is l0 * (1 + off[d]), and whose score is the same in all."""
    return {
        "rows": [8] * documents,
        "l0": [8 * l0 * (1 + each) for each in off],
        "sse": [1 - score] * documents,
        "sst": [1] * documents,
    }


def factor_of_three(off):
    """A Gated curve without noise, and a baseline of three times its latents that varies from document to document."""
    documents, still = len(off), np.zeros(len(off))
    found = []
    for l0, score in ((10, 0.8), (20, 0.9), (40, 0.95)):
        known = {"explained_variance": score, "per_document": flat(l0, score, documents, still)}
        found.append(sweep()[0] | known | {"architecture": "gated", "l0": l0, "l1_coefficient": l0})
        known = {"explained_variance": score, "per_document": flat(3 * l0, score, documents, off)}
        found.append(sweep()[0] | known | {"architecture": "relu", "l0": 3 * l0, "l1_coefficient": l0})
    return found


def test_equal_documents_give_an_interval_of_no_width():
    interval = bootstrap(*curves(factor_of_three(np.zeros(20))), "explained_variance", resamples=20)
    assert interval is not None
    assert [interval.low, interval.middle, interval.high] == pytest.approx([3, 3, 3])


def test_the_interval_over_documents_has_the_known_variance_and_that_over_their_contexts_is_too_narrow():
    # The ratio of a redraw is 3 times the mean of 1 + off, so its standard error is known. Contexts of one document
    # are copies of each other: redrawing contexts pretends that there are 10 times as many draws.
    off = np.random.default_rng(0).normal(size=60) / 5
    off -= off.mean()
    error = 3 * off.std() / np.sqrt(len(off))
    over_documents = bootstrap(*curves(factor_of_three(off)), "explained_variance", resamples=4000)
    over_contexts = bootstrap(*curves(factor_of_three(np.repeat(off, 10))), "explained_variance", resamples=4000)
    assert over_documents is not None
    assert over_contexts is not None
    width = over_documents.high - over_documents.low
    assert width == pytest.approx(2 * 1.6449 * error, rel=0.06)
    assert over_contexts.high - over_contexts.low == pytest.approx(2 * 1.6449 * error / np.sqrt(10), rel=0.06)
    assert over_documents.middle == pytest.approx(3, abs=error / 10)


def test_the_spread_of_seeds_is_in_the_interval_from_five_seeds_on():
    def seeds(count):
        """Seeds of which the baseline has 0.8, 1, 1.2, ... times the L0 of `sweep`, without noise of documents."""
        found = []
        for seed in range(count):
            for e in factor_of_three(np.zeros(20)):
                times = 0.8 + 0.2 * seed if e["architecture"] == "relu" else 1.0
                sums = e["per_document"]
                known = {**sums, "l0": [value * times for value in sums["l0"]]}
                found.append(e | {"seed": seed, "l0": e["l0"] * times, "per_document": known})
        return found

    four = bootstrap(*curves(seeds(4)), "explained_variance", resamples=200)
    five = bootstrap(*curves(seeds(5)), "explained_variance", resamples=2000)
    assert four is not None
    assert five is not None
    assert (four.seeds, five.seeds) == (False, True)
    assert four.high == pytest.approx(four.low)
    error = 3 * 0.2 * np.sqrt(2) / np.sqrt(5)  # of the mean of 0.8, 1, 1.2, 1.4, 1.6
    assert five.high - five.low == pytest.approx(2 * 1.6449 * error, rel=0.1)
    assert summary(typed(seeds(5)))["seeds_redrawn"] is True
    without = [e for e in seeds(5) if (e["seed"], e["l1_coefficient"], e["architecture"]) != (4, 10, "gated")]
    assert redrawn_seeds(*curves(without)) == []


def test_sums_that_are_missing_or_of_other_documents_or_of_one_give_no_interval():
    gated, _ = curves(sweep())
    _, without = curves(changed(sweep(), lambda sums: {**sums, "clean": None}))
    assert bootstrap(gated, without, "ce_loss_score") is None
    assert bootstrap(gated, without, "kl_div_score") is not None
    _, fewer = curves(changed(sweep(), lambda sums: {key: column[:-1] for key, column in sums.items()}))
    assert bootstrap(gated, fewer, "ce_loss_score") is None
    assert bootstrap(*curves(changed(sweep(), lambda sums: None)), "explained_variance") is None
    one = changed(sweep(), lambda sums: {key: [sum(column)] for key, column in sums.items()})
    assert bootstrap(*curves(one), "explained_variance") is None
    assert bootstrap(Curve.of([]), Curve.of([]), "explained_variance") is None
