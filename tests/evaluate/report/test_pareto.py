"""The L0 ratio of two hand-made curves, of the means over seeds, and of each seed."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsae.evaluate import Evaluation, summary
from gsae.evaluate.report.pareto import Point, l0_ratio, non_dominated
from gsae.evaluate.report.seed_means import Curve, values_of
from gsae.tests.support.report_run import DOCUMENTS, RATIO, scores, sweep

GATED = [Point(10, 0.8), Point(20, 0.9), Point(40, 0.95)]
BASELINE = [Point(30, 0.8), Point(60, 0.9), Point(120, 0.95)]


def test_parallel_curves_give_their_factor():
    assert l0_ratio(GATED, BASELINE).value == pytest.approx(3)
    assert l0_ratio(BASELINE, GATED).value == pytest.approx(1 / 3)


def test_the_ratio_is_the_median_over_even_steps_of_the_common_scores():
    # The ratio runs from 2 at 0.8 to 4 at 0.9, log-linearly; scores outside the common range must not matter.
    gated = [Point(10, 0.8), Point(20, 0.9), Point(1000, 0.91)]
    baseline = [Point(1, 0.79), Point(20, 0.8), Point(80, 0.9)]
    ratio = l0_ratio(gated, baseline)
    assert ratio.value == pytest.approx(math.sqrt(8))
    assert [at.name for at in ratio.at] == ["low", "middle", "high"]
    assert [at.score for at in ratio.at] == pytest.approx([0.81, 0.85, 0.89])
    assert [at.ratio for at in ratio.at] == pytest.approx([2**1.1, 2**1.5, 2**1.9])


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


def test_a_summary_has_all_ratios_with_intervals_as_json():
    found = summary(typed(sweep()))
    for key in ("l0_ratio", "l0_ratio_kl", "l0_ratio_ev"):
        assert found[key] == pytest.approx(RATIO, rel=0.05)
        low, high = found[f"{key}_interval"]
        assert low < found[key] < high
        at = found[f"{key}_at"]
        assert list(at) == ["low", "middle", "high"]
        assert at["low"]["score"] < at["middle"]["score"] < at["high"]["score"]
        assert [each["ratio"] for each in at.values()] == pytest.approx([RATIO] * 3, rel=0.05)
        assert found["seeds"] == [{"seed": 0} | {k: found[k] for k in ("l0_ratio", "l0_ratio_kl", "l0_ratio_ev")}]
    assert found["reason"] is None
    assert found["documents"] == DOCUMENTS
    assert found["seeds_redrawn"] is False
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found == summary(typed(sweep()[::-1]))


def scaled(evaluations, seed, factor):
    """The sweep of a seed in which the baseline needs `factor` times the latents of `sweep`."""
    more = {"gated": 1.0, "relu": factor}
    return [e | {"seed": seed, "l0": e["l0"] * more[e["architecture"]]} for e in evaluations]


def test_the_ratio_is_that_of_seed_means_and_each_seed_has_its_own():
    alone = summary(typed(sweep()))["l0_ratio"]
    found = summary(typed([*scaled(sweep(), 0, 1.0), *scaled(sweep(), 1, 1.4)]))
    # Equal scores in both seeds, so the mean only averages L0: 1.2 times that of seed 0.
    assert found["l0_ratio"] == pytest.approx(1.2 * alone)
    assert [(own["seed"], own["l0_ratio"]) for own in found["seeds"]] == [
        (0, pytest.approx(alone)),
        (1, pytest.approx(1.4 * alone)),
    ]
    assert found["seeds_redrawn"] is False


def test_a_seed_without_a_baseline_has_no_ratio_of_its_own():
    only = [e for e in scaled(sweep(), 1, 1.0) if e["architecture"] == "gated"]
    assert [own["l0_ratio"] is None for own in summary(typed([*sweep(), *only]))["seeds"]] == [False, True]


def test_saes_of_one_setting_are_a_point_and_a_second_one_of_a_seed_stays_apart():
    saes = typed([*sweep(), *scaled(sweep(), 1, 1.0), *scaled(sweep(), 1, 2.0)])
    curve = Curve.of(e for e in saes if e.architecture == "relu")
    assert sorted(map(len, curve.points)) == [1] * 5 + [2] * 5
    assert curve == Curve.of(e for e in saes[::-1] if e.architecture == "relu")
    l0 = values_of(curve.saes, "l0")
    for members, mean in zip(curve.points, curve.means(l0), strict=True):
        assert len({(curve.saes[i].d_sae, curve.saes[i].l1_coefficient, curve.saes[i].lr) for i in members}) == 1
        assert len({curve.saes[i].seed for i in members}) == len(members)
        assert mean == pytest.approx(l0[list(members)].mean())
    assert curve.fewest_seeds == 1


def test_an_eval_json_of_an_older_version_gives_the_ratio_without_an_interval():
    old = [{**e, "per_context": e["per_document"]} for e in sweep()]
    for e in old:
        del e["per_document"], e["heldout_documents"]
    found, new = summary(typed(old)), summary(typed(sweep()))
    for key in ("l0_ratio", "l0_ratio_kl", "l0_ratio_ev"):
        assert found[key] == new[key]
        assert found[f"{key}_interval"] is None
    assert found["documents"] is None


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
