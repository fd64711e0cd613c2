import pytest

from benchmarks.figures import Figure, ratios


def test_a_ratio_is_taken_within_each_round():
    # The machine was twice as slow in the second round, on both sides.
    assert ratios([1.0, 2.0, 1.0], [2.0, 4.0, 4.0]) == [0.5, 0.5, 0.25]


def test_sides_of_unlike_rounds_have_no_ratio():
    with pytest.raises(ValueError):
        ratios([1.0, 2.0], [1.0])


def test_a_figure_is_the_median_with_its_spread():
    record = Figure("a / b", [0.5, 3.0, 0.7]).record()
    assert (record["value"], record["spread"], record["rounds"]) == (0.7, [0.5, 3.0], [0.5, 3.0, 0.7])
    assert not record["bound"]


@pytest.mark.parametrize(
    ("rounds", "goals", "met"),
    [
        ([1.0, 1.1, 9.0], {"at_most": 1.1}, True),
        ([1.0, 1.2, 1.3], {"at_most": 1.1}, False),
        ([1.7, 1.8, 1.9], {"at_least": 1.8}, True),
        ([1.7, 1.7, 1.9], {"at_least": 1.8}, False),
        ([0.8], {"at_most": 1.1, "at_least": 0.9}, False),
    ],
)
def test_a_goal_is_met_by_the_median(rounds, goals, met):
    assert Figure("a / b", rounds, **goals).record()["met"] is met
