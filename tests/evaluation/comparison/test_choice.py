import math

import pytest

from elm_trainer.comparison.report import choose, score
from elm_trainer.evaluation.verdict import Criteria


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
