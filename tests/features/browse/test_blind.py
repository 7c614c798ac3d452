"""A blind comparison: what is served reveals no SAE, a seed fixes the draw, and the result is counted right."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from gsae.errors import CorruptError, IncompatibleError, NotFoundError, UsageError
from gsae.features import BlindSettings, build_blind, compare_ratings, ratings_of
from gsae.features.browse.blind_key import read_key
from gsae.features.browse.ratings import Ratings
from gsae.tests.support.browser_run import rows_fired_by, write_features


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_features(tmp_path / "run", "a-relu", architecture="relu", d_sae=70)
    write_features(tmp_path / "run", "b-gated", d_sae=100)
    return tmp_path / "run"


def test_what_is_served_does_not_reveal_the_sae_or_the_latent(run: Path) -> None:
    blind = build_blind(run, (), settings=BlindSettings(pairs=10, seed=1))
    files = [
        path for path in (blind / "site" / "data").rglob("*") if path.is_file() and path.parent.name != "vocabularies"
    ]
    assert sum(path.parent.name == "trials" for path in files) == 20
    for path in files:
        assert not re.search(r"relu|gated|latent|density|neighbour|cosine", path.read_text(), re.IGNORECASE)
    for number in range(20):
        trial = json.loads((blind / f"site/data/trials/{number:05d}.json").read_text())
        assert set(trial) == {"examples", "contexts", "promoted", "suppressed", "promoted_logits",
                              "suppressed_logits"}  # fmt: skip
        ranks = [example[3] for example in trial["examples"]]
        assert ranks == pytest.approx([1, 0.8, 0.125, 0.6], abs=0.011)  # between the quantiles' edges: .1, .5, 1
        assert max(map(abs, trial["promoted_logits"] + trial["suppressed_logits"])) == 1
    assert not list((blind / "site").rglob("*key*"))


def test_the_draw_is_of_latents_that_fire_often_and_fixed_by_the_seed(run: Path, tmp_path: Path) -> None:
    key = read_key(build_blind(run, (), settings=BlindSettings(pairs=20, seed=1, minimum_rows=100)))
    assert key.saes == ("b-gated", "a-relu")  # the Gated one is the first
    for sae in (0, 1):
        drawn = [trial.latent for trial in key.trials if trial.sae == sae]
        assert len(set(drawn)) == len(drawn) == 20
        assert all(rows_fired_by(latent) >= 100 for latent in drawn)
    assert sorted(trial.pair for trial in key.trials) == sorted([*range(20)] * 2)
    assert [trial.sae for trial in key.trials] != [0, 1] * 20
    assert (
        read_key(build_blind(run, (), tmp_path / "same", settings=BlindSettings(pairs=20, seed=1, minimum_rows=100)))
        == key
    )
    assert (
        read_key(build_blind(run, (), tmp_path / "other", settings=BlindSettings(pairs=20, seed=2, minimum_rows=100)))
        != key
    )


def test_the_comparison_is_that_of_the_pairs_counted_by_hand(run: Path) -> None:
    blind = build_blind(run, (), settings=BlindSettings(pairs=4, seed=3))
    key, ratings = read_key(blind), ratings_of(blind)
    said = {0: (2, 0), 1: (1, 1), 2: (2, 1), 3: (0, None)}  # a pair: of Gated, of the baseline
    for number, trial in enumerate(key.trials):
        rating = said[trial.pair][trial.sae]
        if rating is not None:
            ratings.record(number, rating)
    found = compare_ratings(blind)
    assert found["counts"] == {"b-gated": {"no": 1, "maybe": 1, "yes": 2}, "a-relu": {"no": 1, "maybe": 2, "yes": 0}}
    assert found["means"] == {"b-gated": 1.25, "a-relu": pytest.approx(2 / 3)}
    assert (found["rated"], found["trials"], found["pairs"]) == (7, 8, 3)
    assert found["difference"] == pytest.approx((2 + 0 + 1) / 3)
    assert found["interval"] == [0.0, 2.0]  # of the 27 ways to draw 2, 0, 1 anew, 1 each has a mean of 0 and of 2
    assert compare_ratings(blind) == found


def test_the_interval_of_many_pairs_is_close_to_that_of_a_normal_mean(run: Path) -> None:
    blind = build_blind(run, (), settings=BlindSettings(pairs=40, seed=3))
    rng, ratings = np.random.default_rng(0), ratings_of(blind)
    said = {pair: rng.integers(0, 3, 2).tolist() for pair in range(40)}
    for number, trial in enumerate(read_key(blind).trials):
        ratings.record(number, said[trial.pair][trial.sae])
    differences = np.array([a - b for a, b in said.values()])
    found, error = compare_ratings(blind), differences.std() / np.sqrt(40)
    wanted = [differences.mean() - 1.96 * error, differences.mean() + 1.96 * error]
    assert found["interval"] == pytest.approx(wanted, abs=0.05)


def test_without_ratings_there_is_no_mean_or_difference(run: Path) -> None:
    found = compare_ratings(build_blind(run, (), settings=BlindSettings(pairs=2)))
    assert (found["difference"], found["interval"], found["pairs"]) == (None, None, 0)
    assert set(found["means"].values()) == {None}


def test_a_comparison_continues_and_another_one_is_refused_its_folder(run: Path) -> None:
    blind = build_blind(run, (), settings=BlindSettings(pairs=5))
    ratings_of(blind).record(3, 2)
    assert build_blind(run, (), settings=BlindSettings(pairs=5)) == blind
    assert ratings_of(blind).current() == {3: 2}
    with pytest.raises(IncompatibleError, match="another comparison"):
        build_blind(run, (), settings=BlindSettings(pairs=6))
    (blind / "key.json").unlink()
    with pytest.raises(CorruptError, match=r"key\.json, which says what was rated, is gone"):
        build_blind(run, (), settings=BlindSettings(pairs=5))


def test_the_last_rating_counts_and_a_torn_line_was_never_answered(tmp_path: Path) -> None:
    path = tmp_path / "ratings.jsonl"
    path.write_text('{"trial": 0, "rating": 0}\n{"trial": 0, "rating": 2}\n{"trial": 1, "rat')
    ratings = Ratings(path, 3)
    assert ratings.current() == {0: 2}
    ratings.record(1, 1)
    assert Ratings(path, 3).current() == {0: 2, 1: 1}
    assert len(path.read_text().splitlines()) == 3
    path.write_text('{"trial": 7, "rating": 0}\n')
    with pytest.raises(CorruptError, match="line 1"):
        Ratings(path, 3)


def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"of two SAEs, not 1.*has features of a-relu, b-gated"):
        build_blind(run, ["a-relu"])
    with pytest.raises(UsageError, match="fewer than --pairs 90"):
        build_blind(run, (), settings=BlindSettings(pairs=90))
    with pytest.raises(NotFoundError, match="no blind comparison"):
        read_key(tmp_path)
    write_features(tmp_path / "mixed", "a")
    write_features(tmp_path / "mixed", "b", store_digest="other")
    with pytest.raises(IncompatibleError, match="store_digest differs"):
        build_blind(tmp_path / "mixed", ())
