"""The L0 ratio of two hand-made curves, and the interval against a plain loop over the same draws."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.evaluate import Evaluation, summary
from gsae.evaluate.eval_json import PerContext
from gsae.evaluate.report.bootstrap import bootstrap
from gsae.evaluate.report.comparison import compare
from gsae.evaluate.report.pareto import Point, l0_ratio, non_dominated
from gsae.tests.support.report_run import RATIO, scores, sweep

GATED = [Point(10, 0.8), Point(20, 0.9), Point(40, 0.95)]
BASELINE = [Point(30, 0.8), Point(60, 0.9), Point(120, 0.95)]


def test_parallel_curves_give_their_factor():
    assert l0_ratio(GATED, BASELINE).value == pytest.approx(3)
    assert l0_ratio(BASELINE, GATED).value == pytest.approx(1 / 3)


def test_the_ratio_is_the_median_over_even_steps_of_the_common_scores():
    # The ratio runs from 2 at 0.8 to 4 at 0.9, log-linearly; scores outside the common range must not matter.
    gated = [Point(10, 0.8), Point(20, 0.9), Point(1000, 0.91)]
    baseline = [Point(1, 0.79), Point(20, 0.8), Point(80, 0.9)]
    assert l0_ratio(gated, baseline).value == pytest.approx(math.sqrt(8))


def test_the_gap_to_draw_lies_on_both_curves():
    ratio = l0_ratio(GATED, BASELINE)
    assert ratio.gap is not None
    assert 0.8 <= ratio.gap.score <= 0.95
    assert ratio.gap.baseline_l0 / ratio.gap.gated_l0 == pytest.approx(ratio.value, rel=0.011)
    low, high = (Point(10, 0.8), Point(20, 0.9)) if ratio.gap.score < 0.9 else (Point(20, 0.9), Point(40, 0.95))
    along = (ratio.gap.score - low.score) / (high.score - low.score)
    assert ratio.gap.gated_l0 == pytest.approx(low.l0 * (high.l0 / low.l0) ** along)


@given(
    st.permutations(GATED),
    st.permutations(BASELINE),
    st.floats(0.1, 10),
    st.lists(st.tuples(st.floats(1.01, 3), st.floats(0.001, 0.3)), max_size=4),
)
@settings(deadline=None, max_examples=50)
def test_order_and_beaten_points_do_not_matter_and_the_ratio_scales(gated, baseline, factor, worse):
    beaten = [Point(gated[0].l0 * more, gated[0].score - less) for more, less in worse]
    scaled = [Point(p.l0 * factor, p.score) for p in baseline]
    assert l0_ratio([*beaten, *gated], scaled).value == pytest.approx(3 * factor)


def test_of_equal_points_one_stays_and_points_without_values_never_count():
    l0 = np.array([5.0, 5, 5, 9, 9, 0, np.nan, 20])
    score = np.array([0.5, 0.5, 0.4, 0.5, 0.6, 0.9, 0.9, np.inf])
    assert l0[non_dominated(l0, score)].tolist() == [5, 9]
    assert score[non_dominated(l0, score)].tolist() == [0.5, 0.6]


@pytest.mark.parametrize(
    ("gated", "reason"),
    [
        ([Point(10, 0.97), Point(20, 0.99)], "share 0%"),
        ([Point(10, 0.94), Point(20, 0.99)], "share 5%"),
        ([Point(10, 0.8)], "Gated curve has 1 usable point,"),
        ([Point(10, 0.8), Point(20, 0.7)], "Gated curve has 1 usable point,"),
        ([], "Gated curve has 0 usable points"),
    ],
)
def test_curves_that_barely_meet_have_no_ratio_but_a_reason(gated, reason):
    ratio = l0_ratio(gated, BASELINE)
    assert ratio.value is None
    assert ratio.gap is None
    assert reason in ratio.reason
    assert "\n" not in ratio.reason


def typed(evaluations):
    return [Evaluation.model_validate(e) for e in evaluations]


def per_context(evaluations, architecture):
    return [e.per_context for e in typed(evaluations) if e.architecture == architecture]


@pytest.mark.parametrize("score", ["ce_loss_score", "explained_variance"])
def test_the_interval_equals_a_plain_loop_over_the_same_draws(score):
    gated, baseline = (per_context(sweep(), a) for a in ("gated", "relu"))
    contexts = len(gated[0].rows)
    raw = np.random.Philox(key=3).random_raw(50 * contexts)
    ratios = []
    for draw in raw.reshape(50, contexts):
        picked = [int(word) % contexts for word in draw]

        def point(sums, picked=picked):
            total = {k: sum(column[c] for c in picked) for k, column in sums if column}
            if score == "explained_variance":
                return Point(total["l0"] / total["rows"], 1 - total["sse"] / total["sst"])
            lost = (total["spliced"] - total["clean"]) / (total["zero"] - total["clean"])
            return Point(total["l0"] / total["rows"], 1 - lost)

        ratios.append(l0_ratio([point(s) for s in gated], [point(s) for s in baseline]).value)
    interval = bootstrap(gated, baseline, score, resamples=50, seed=3)
    assert interval is not None
    expected = np.quantile(ratios, [0.05, 0.5, 0.95])
    assert [interval.low, interval.middle, interval.high] == pytest.approx(expected.tolist(), rel=1e-9)
    assert interval.defined == 1


def test_the_interval_contains_the_ratio_and_follows_from_the_seed_alone():
    gated, baseline = (per_context(sweep(), a) for a in ("gated", "relu"))
    found = bootstrap(gated, baseline, "ce_loss_score")
    assert found is not None
    assert found.low < compare(typed(sweep()), "ce_loss_score").ratio.value < found.high
    assert found.high - found.low > 0.05
    assert found == bootstrap(gated, baseline, "ce_loss_score")
    assert found == bootstrap(gated[::-1], baseline[::-1], "ce_loss_score")
    assert found != bootstrap(gated, baseline, "ce_loss_score", seed=1)


def test_equal_contexts_give_an_interval_of_no_width():
    def sae(l0, score):
        return PerContext(rows=[8] * 20, l0=[8 * l0] * 20, sse=[1 - score] * 20, sst=[1] * 20)

    gated, baseline = ([sae(p.l0, p.score) for p in curve] for curve in (GATED, BASELINE))
    interval = bootstrap(gated, baseline, "explained_variance", resamples=20)
    assert interval is not None
    assert [interval.low, interval.middle, interval.high] == pytest.approx([3, 3, 3])


def test_sums_that_are_missing_or_of_other_contexts_give_no_interval():
    gated, baseline = (per_context(sweep(), a) for a in ("gated", "relu"))
    assert bootstrap([s.model_copy(update={"clean": None}) for s in gated], baseline, "ce_loss_score") is None
    fewer = [PerContext(**{key: column[:-1] for key, column in sums if column}) for sums in gated]
    assert bootstrap(fewer, baseline, "ce_loss_score") is None
    assert bootstrap([PerContext()], [PerContext()], "explained_variance") is None


def test_a_summary_has_both_ratios_with_intervals_as_json():
    found = summary(typed(sweep()))
    assert found["l0_ratio"] == pytest.approx(RATIO, rel=0.05)
    assert found["l0_ratio_ev"] == pytest.approx(RATIO, rel=0.05)
    for key in ("l0_ratio", "l0_ratio_ev"):
        low, high = found[f"{key}_interval"]
        assert low < found[key] < high
    assert found["reason"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found == summary(typed(sweep()[::-1]))


def test_without_the_language_model_only_explained_variance_has_a_ratio():
    found = summary(typed(sweep(ce=False)))
    assert found["l0_ratio"] is None
    assert found["l0_ratio_interval"] is None
    assert found["reason"].startswith("ce_loss_score: no SAE has it (the language model")
    assert found["l0_ratio_ev"] == pytest.approx(RATIO, rel=0.05)


def test_saes_of_different_sites_are_not_compared():
    found = summary(typed([*sweep(), *sweep(site="resid.15")]))
    assert found["l0_ratio"] is None
    assert "mlp.10, resid.15" in found["reason"]


def test_the_synthetic_curves_are_a_factor_apart():
    assert scores(8.0)[0] > scores(4.0)[0]
