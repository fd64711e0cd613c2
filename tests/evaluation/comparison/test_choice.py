import math

import pytest

from elm_trainer.evaluation.comparison.choice import choose, score


ROLES = {"capitals": "erased", "general": "far"}


def figures(accuracy=0.45, named=0.05, r_ppl=1.5, fall=0.03, perplexity=1.05):
    """Figures that reach every bound, or go beyond."""

    def figure(erased, change):
        return {
            "erased": dict.fromkeys(("value", "low", "high"), erased),
            "change": dict.fromkeys(("value", "low", "high"), change),
        }

    return {
        "multiple_choice.capitals.pmi": figure(accuracy, -0.2),
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
        ({"accuracy": 0.9}, "innocence", 2.0),
        ({"named": 0.5}, "innocence", 10.0),
        ({"r_ppl": 1.5**4}, "seamlessness", 4.0),
        ({"fall": 0.09}, "specificity", 3.0),
        ({"perplexity": 1.05**5}, "specificity", 5.0),
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
    better = score(figures(accuracy=0.0, named=0.0, r_ppl=0.9, fall=-0.1, perplexity=0.99), ROLES)
    assert better["worst"] <= 0 and better["seamlessness"] == pytest.approx(math.log(0.9) / math.log(1.5))
