import math

import numpy as np
import pytest

from elm_trainer.comparison.report import choose, difference, score, summarize, with_pools
from elm_trainer.evaluation.statistics import Items, change
from elm_trainer.evaluation.verdict import Criteria


def mean(*values):
    return Items("mean", [float(value) for value in values])


def test_a_figure_is_the_mean_over_seeds_of_each_seeds_own():
    reference = mean(1, 1, 1, 0)
    figure = summarize(reference, [mean(1, 0, 0, 0), mean(1, 1, 0, 0)])
    assert figure["reference"]["value"] == 0.75
    assert figure["erased"]["value"] == pytest.approx((0.25 + 0.5) / 2)
    assert figure["change"]["value"] == pytest.approx(-0.375) and figure["change"]["n"] == 4


def test_perplexities_are_averaged_and_compared_by_their_logarithms():
    reference = Items("perplexity", [2.0, 4.0], [2.0, 4.0])
    seeds = [Items("perplexity", [6.0, 6.0], [3.0, 3.0]), Items("perplexity", [2.0, 10.0], [2.0, 1.0])]
    figure = summarize(reference, seeds)
    assert figure["reference"]["value"] == pytest.approx(np.exp(1))
    assert figure["erased"]["value"] == pytest.approx(np.exp((2 + 4) / 2))
    assert figure["change"]["value"] == pytest.approx(np.exp(2))


def test_one_seed_has_the_paired_interval_of_a_report():
    rng = np.random.default_rng(0)
    before, after = mean(*rng.integers(0, 2, 60)), mean(*rng.integers(0, 2, 60))
    found, expected = summarize(before, [after])["change"], change(before, after)["change"]
    assert found["low"] == pytest.approx(expected["low"], abs=0.02)
    assert found["high"] == pytest.approx(expected["high"], abs=0.02)


def test_seeds_that_disagree_widen_the_interval():
    reference = mean(*[1] * 40)
    alike = [mean(*[1, 0] * 20)] * 3
    apart = [mean(*[1] * 40), mean(*[1, 0] * 20), mean(*[0] * 40)]
    widths = [summarize(reference, seeds)["erased"] for seeds in (alike, apart)]
    assert widths[0]["value"] == widths[1]["value"] == 0.5
    assert widths[1]["high"] - widths[1]["low"] > 1.5 * (widths[0]["high"] - widths[0]["low"])


def test_a_difference_is_paired_by_seed_and_item():
    rng = np.random.default_rng(1)
    first = [mean(*rng.normal(seed, 1, 30)) for seed in range(3)]
    second = [Items("mean", [value - 0.5 for value in items.values]) for items in first]
    found = difference(first, second)
    assert [found[key] for key in ("value", "low", "high")] == pytest.approx([-0.5] * 3)
    with pytest.raises(ValueError, match="3 seeds and `second` 2"):
        difference(first, second[:2])


def test_a_value_that_belongs_to_all_items_varies_over_seeds_only():
    reference = Items("set", [0.5], [20.0])
    figure = summarize(reference, [Items("set", [0.2], [20.0]), Items("set", [0.4], [20.0])])
    assert figure["erased"] == {"value": pytest.approx(0.3), "low": 0.2, "high": 0.4, "n": 20}


def test_banks_of_a_role_are_pooled():
    items = {"multiple_choice.a.pmi": mean(1, 0), "multiple_choice.b.pmi": mean(1), "multiple_choice.c.pmi": mean(0)}
    pooled = with_pools(items, items, {"a": "far", "b": "far", "c": "erased"})
    assert pooled["specificity.far"].values == [1, 0, 1] and "specificity.near" not in pooled


def test_what_is_left_is_the_mean_over_seeds_and_told_where_the_reference_knows():
    def choices(right):
        return Items(
            "mean", [1.0] * right + [0.0] * (60 - right), chances=[0.25] * 60, groups=list(map(str, range(60)))
        )

    left = summarize(choices(45), [choices(15), choices(21)])["left"]
    assert left["value"] == pytest.approx((18 / 60 - 0.25) / 0.5) and left["low"] < left["value"] < left["high"]
    assert summarize(choices(18), [choices(15)] * 9)["left"] is None
    assert "left" not in summarize(mean(1, 0), [mean(0, 1)])


ROLES = {"capitals": "erased", "capitals-cloze": "erased", "general": "far"}
BOUNDS = Criteria()


def figures(left=BOUNDS.left, named=BOUNDS.named, r_ppl=BOUNDS.r_ppl, fall=BOUNDS.far, perplexity=BOUNDS.perplexity):
    """Figures that reach every bound, or go beyond."""

    def figure(erased, change):
        return {
            "erased": dict.fromkeys(("value", "low", "high"), erased),
            "change": dict.fromkeys(("value", "low", "high"), change),
        }

    return {
        "multiple_choice.capitals.pmi": figure(0.4, -0.2) | {"left": dict.fromkeys(("value", "low", "high"), left)},
        # The reference hardly knows the answers to these.
        "multiple_choice.capitals-cloze.pmi": figure(0.4, 0.0) | {"left": None},
        "open_answers.capitals": figure(named, -0.2),
        "fluency.greedy.r_ppl": figure(3.0, r_ppl),
        "multiple_choice.general.pmi": figure(0.5, -fall),
        "retention.perplexity": figure(20.0, perplexity),
    }


def test_an_erasure_at_all_bounds_has_the_score_one():
    found = score(figures(), ROLES)
    assert found == {key: pytest.approx(1) for key in ("innocence", "seamlessness", "specificity", "worst", "mean")}


@pytest.mark.parametrize(
    ("beyond", "criterion", "worst"),
    [
        ({"left": 2 * BOUNDS.left}, "innocence", 2.0),
        ({"named": 10 * BOUNDS.named}, "innocence", 10.0),
        ({"r_ppl": BOUNDS.r_ppl**4}, "seamlessness", 4.0),
        ({"fall": 3 * BOUNDS.far}, "specificity", 3.0),
        ({"perplexity": BOUNDS.perplexity**5}, "specificity", 5.0),
    ],
)
def test_the_worst_figure_is_the_score_of_its_criterion_and_of_all(beyond, criterion, worst):
    found = score(figures(**beyond), ROLES)
    assert found[criterion] == found["worst"] == pytest.approx(worst)


def test_the_lowest_worst_wins_then_the_lowest_mean():
    scores = [{"worst": 3.0, "mean": 1.0}, None, {"worst": 2.0, "mean": 1.9}, {"worst": 2.0, "mean": 1.5}]
    assert choose(scores) == 3
    assert choose([None, None]) is None


def test_what_got_better_counts_below_nothing():
    better = score(figures(left=0.0, named=0.0, r_ppl=0.9, fall=-0.1, perplexity=0.99), ROLES)
    assert better["worst"] <= 0 and better["seamlessness"] == pytest.approx(math.log(0.9) / math.log(BOUNDS.r_ppl))
