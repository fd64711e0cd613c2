import pytest

from elm_trainer.data.target_store import LARGEST_STORE, choose


ENOUGH = dict(rows=100, visits=100, needed=10**9, missing=10**9, free=10**10)


@pytest.mark.parametrize(
    ("given", "precompute", "reason"),
    [
        ({}, True, "visits 100 times"),
        ({"visits": 99}, False, "visits 99 of 100 rows"),
        ({"visits": 1e6}, True, "visits 1e"),
        ({"free": 2 * 10**9}, True, ""),
        ({"free": 2 * 10**9 - 1}, False, "more than half of the 1.86 GiB that are free"),
        ({"free": 0, "missing": 0}, True, ""),
        ({"needed": LARGEST_STORE, "missing": 0}, True, "64 GiB"),
        ({"needed": LARGEST_STORE + 2**30, "missing": 0}, False, "65 GiB, more than 64 GiB"),
    ],
)
def test_targets_are_stored_where_each_row_is_visited_and_there_is_room(given, precompute, reason):
    choice = choose(**(ENOUGH | given))
    assert choice.precompute is precompute
    assert reason in choice.reason
