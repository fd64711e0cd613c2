import json

import pytest

from benchmarks.report import Figure, draw, figures_of, ratios, read_report, write_report


@pytest.fixture
def figure():
    return Figure("a / b", [1.0, 2.0, 4.0], at_most=3.0).record()


def test_a_report_holds_the_figures_and_what_they_were_measured_on(tmp_path, figure):
    report = read_report(write_report(tmp_path / "bench", {"growth": figure}, {"repeats": 3}))
    assert report["schema_version"] == 1
    assert report["growth"]["value"] == 2.0
    assert report["growth"]["settings"] == {"repeats": 3}
    assert report["growth"]["machine"]["libraries"]["trl"]


def test_figures_of_an_earlier_run_are_kept_and_measured_ones_replaced(tmp_path, figure):
    write_report(tmp_path, {"growth": figure, "prediction": figure}, {"repeats": 3})
    report = read_report(write_report(tmp_path, {"growth": figure | {"value": 9.0}}, {"repeats": 5}))
    assert [report[key]["value"] for key in ("growth", "prediction")] == [9.0, 2.0]
    assert [report[key]["settings"]["repeats"] for key in ("growth", "prediction")] == [5, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_report_of_another_schema_is_neither_read_nor_overwritten(tmp_path, figure):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"schema_version": 0}))
    with pytest.raises(ValueError, match="`schema_version`.*output_dir"):
        write_report(tmp_path, {"growth": figure}, {})
    assert json.loads(path.read_text()) == {"schema_version": 0}


def test_the_picture_shows_every_figure(tmp_path, figure):
    report = read_report(write_report(tmp_path, {"a": figure, "b": figure | {"bound": True, "met": False}}, {}))
    assert list(figures_of(report)) == ["a", "b"]
    draw(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


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
