import copy

import pytest

from elm_trainer import compare_reports


def test_a_report_compared_with_itself_changes_nothing(report):
    compared = compare_reports(report, report)
    assert compared.keys() == {name for name in report["figures"] if not name.startswith("families.")}
    for name, figure in compared.items():
        assert figure["first"] == figure["second"] == report["figures"][name]["erased"]
        unchanged = 1 if report["figures"][name]["statistic"] == "perplexity" else 0
        assert figure["change"]["value"] == figure["change"]["low"] == unchanged
        assert figure["p"] in (1.0, None)


def test_a_better_erasure_shows(report):
    other = copy.deepcopy(report)
    name = "multiple_choice.capitals.pmi"
    report["items"][name]["erased"]["values"] = [1.0] * 6
    other["items"][name]["erased"]["values"] = [0.0] * 6
    figure = compare_reports(report, other)[name]
    assert figure["change"] == {"value": -1, "low": -1, "high": -1, "n": 6}
    assert figure["p"] <= len(report["figures"]) * 2 * 0.5**6


@pytest.mark.parametrize("field", ["revision", "size", "sha256"])
def test_reports_on_other_questions_refuse_to_be_compared(field, report):
    other = copy.deepcopy(report)
    other["datasets"]["bank capitals"][field] = 7
    with pytest.raises(ValueError, match=rf"ask different things \(bank capitals\).*{field}"):
        compare_reports(report, other)


def test_a_bank_that_one_report_lacks_is_refused(report):
    other = copy.deepcopy(report)
    del other["datasets"]["bank geography"]
    with pytest.raises(ValueError, match="'bank geography' is .* in the first and None in the second"):
        compare_reports(report, other)


def test_reports_on_other_models_are_refused(report):
    with pytest.raises(ValueError, match="different reference models"):
        compare_reports(report, report | {"reference_sha256": "0" * 64})
