import pytest

from benchmarks.__main__ import SECTIONS, BenchmarkArguments, main
from benchmarks.report import SCHEMA_VERSION


def test_the_sections_that_train_the_real_model_longest_run_only_where_they_are_named():
    assert set(SECTIONS) - set(BenchmarkArguments().only) == {
        "growth_real",
        "live_targets",
        "sharing",
        "target_precision",
        "time_to_quality",
    }
    assert "gpu" not in BenchmarkArguments().only


def test_an_unknown_section_is_refused():
    with pytest.raises(ValueError, match="`only` names \\['speed'\\].*growth"):
        BenchmarkArguments(only=["speed"])


@pytest.mark.parametrize("name", ["repeats", "threads", "budget"])
def test_a_number_that_is_not_above_zero_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is 0"):
        BenchmarkArguments(**{name: 0})


def test_a_report_of_another_schema_stops_the_run_before_it_measures(tmp_path):
    (tmp_path / "report.json").write_text(f'{{"schema_version": {SCHEMA_VERSION + 1}}}')
    with pytest.raises(ValueError, match="schema_version"):
        main(BenchmarkArguments(output_dir=str(tmp_path)))
