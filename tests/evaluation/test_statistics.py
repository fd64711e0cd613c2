import math

import numpy as np
import pytest

from elm_trainer.evaluation.statistics import (
    Figure,
    bootstrap_mean,
    bootstrap_perplexity,
    bootstrap_ratio,
    holm,
    mcnemar,
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
    assert bootstrap_mean([0.0, 1.0]) == Figure(0.5, 0.0, 1.0, 2)


def test_the_interval_shrinks_with_the_root_of_the_count():
    values = np.random.default_rng(0).normal(size=1600).tolist()

    def width(figure):
        return figure.high - figure.low

    assert width(bootstrap_mean(values[:100])) / width(bootstrap_mean(values)) == pytest.approx(4, rel=0.2)


def test_equal_items_have_an_interval_without_width():
    assert bootstrap_mean([0.25] * 8) == Figure(0.25, 0.25, 0.25, 8)


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
