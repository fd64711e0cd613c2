import math

import numpy as np
import pytest

from elm_trainer.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    bootstrap_perplexity,
    bootstrap_ratio,
    holm,
    mcnemar,
    share_left,
)


def test_the_value_is_the_plain_mean_and_stands_beside_its_count():
    figure = bootstrap_mean([1.0, 2.0, 6.0])

    assert figure.value == pytest.approx(3.0)
    assert figure.n == 3
    assert figure.to_dict() == {"value": figure.value, "low": figure.low, "high": figure.high, "n": 3}


def test_the_interval_of_a_share_agrees_with_the_normal_approximation():
    n, hits = 400, 120
    p = hits / n
    figure = bootstrap_mean([True] * hits + [False] * (n - hits), resamples=20000)
    half = 1.96 * math.sqrt(p * (1 - p) / n)

    assert figure.low == pytest.approx(p - half, abs=0.005)
    assert figure.high == pytest.approx(p + half, abs=0.005)


def test_the_interval_of_two_items_agrees_with_their_four_resamples():
    # The mean of two resampled items is 0, ½, ½ or 1, each a quarter of the time: 2.5 % and 97.5 % fall on 0 and 1.
    assert bootstrap_mean([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0, 2)


def test_the_interval_shrinks_with_the_root_of_the_count():
    values = np.random.default_rng(0).normal(size=1600).tolist()

    def width(figure):
        return figure.high - figure.low

    assert width(bootstrap_mean(values[:100])) / width(bootstrap_mean(values)) == pytest.approx(4, rel=0.2)


def test_equal_items_have_an_interval_without_width():
    assert bootstrap_mean([0.25] * 8) == Estimate(0.25, 0.25, 0.25, 8)


def test_a_seed_repeats_its_interval():
    values = [index / 7 % 1 for index in range(40)]

    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_a_ratio_weighs_texts_by_their_tokens():
    figure = bootstrap_ratio([2.0, 30.0], [1, 3])

    assert figure.value == pytest.approx(8.0)
    assert (figure.low, figure.high) == (pytest.approx(2.0), pytest.approx(10.0))


def test_a_ratio_of_texts_of_one_token_is_the_mean():
    values = [0.3, 1.2, 2.5, 0.1]

    assert bootstrap_ratio(values, [1] * 4) == bootstrap_mean(values)


def test_perplexity_is_the_exponential_of_the_mean_per_token():
    mean = bootstrap_ratio([2.0, 30.0, 4.0], [1, 3, 2])
    figure = bootstrap_perplexity([2.0, 30.0, 4.0], [1, 3, 2])

    assert figure.value == pytest.approx(math.exp(36 / 6))
    assert (figure.low, figure.high) == (pytest.approx(math.exp(mean.low)), pytest.approx(math.exp(mean.high)))


def test_a_uniform_model_has_its_vocabulary_as_perplexity():
    tokens = [3, 5, 8]
    figure = bootstrap_perplexity([math.log(100) * count for count in tokens], tokens)

    assert figure.to_dict() == pytest.approx({"value": 100, "low": 100, "high": 100, "n": 3})


@pytest.mark.parametrize("measured", [lambda: bootstrap_mean([]), lambda: bootstrap_perplexity([], [])])
def test_nothing_measured_is_an_error(measured):
    with pytest.raises(ValueError, match="nothing to average"):
        measured()


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (5, 0, 2 * 0.5**5), (5, 5, 1.0), (9, 1, 2 * (1 + 10) * 0.5**10)]
)
def test_mcnemar_is_the_binomial_test_of_the_questions_that_changed(gained, lost, p):
    before = [False] * gained + [True] * lost + [True, False]
    after = [True] * gained + [False] * lost + [True, False]
    assert mcnemar(before, after) == pytest.approx(p)


def test_mcnemar_wants_the_same_questions():
    with pytest.raises(ValueError, match="same questions"):
        mcnemar([True], [True, False])


def test_holm_steps_down_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def slow_share(before, after, chances, groups, resamples, seed):
    """Resamples of the share, each made by drawing subjects one by one."""
    subjects = list(dict.fromkeys(groups))
    rng = np.random.default_rng(seed)
    shares = []
    for _ in range(resamples):
        drawn = [subjects[index] for index in rng.integers(0, len(subjects), len(subjects))]
        items = [index for subject in drawn for index, group in enumerate(groups) if group == subject]
        left = sum(after[index] - chances[index] for index in items)
        shares.append(left / sum(before[index] - chances[index] for index in items))
    return shares


def test_the_share_of_a_margin_is_that_of_the_accuracies():
    before, after = [1.0] * 8 + [0.0] * 2, [1.0] * 4 + [0.0] * 6

    left = share_left(before, after, [0.25] * 10, list("abcdefghij"))

    assert left.value == pytest.approx((0.4 - 0.25) / (0.8 - 0.25)) and left.n == 10


def test_the_interval_of_a_share_is_that_of_drawing_subjects():
    rng = np.random.default_rng(1)
    groups = [f"s{index % 30}" for index in range(70)]
    chances = [0.5 if index % 3 == 0 else 0.25 for index in range(70)]
    before, after = ((rng.random(70) < p).astype(float).tolist() for p in (0.85, 0.45))

    left = share_left(before, after, chances, groups, resamples=4000)

    slow = slow_share(before, after, chances, groups, 4000, seed=7)
    assert [left.low, left.high] == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.04)
    apart = share_left(before, after, chances, [str(index) for index in range(70)], resamples=4000)
    assert apart.value == left.value and apart.low != left.low


@pytest.mark.parametrize(("after", "share"), [([1.0, 1.0, 1.0, 0.0], 1.0), ([1.0, 0.0, 0.0, 0.0], 0.0)])
def test_as_good_as_before_leaves_everything_and_chance_leaves_nothing(after, share):
    assert share_left([1.0, 1.0, 1.0, 0.0], after, [0.25] * 4, [1, 2, 3, 4]).value == pytest.approx(share)


def test_a_margin_that_is_none_gives_numbers_all_the_same():
    left = share_left([0.0, 0.0], [1.0, 0.0], [0.5, 0.5], ["a", "b"])

    assert np.isfinite([left.value, left.low, left.high]).all()


def test_a_share_needs_the_same_items_on_both_sides():
    with pytest.raises(ValueError, match="`before` holds 1 items and `after` 2"):
        share_left([1.0], [1.0, 0.0], [0.25], ["a"])
