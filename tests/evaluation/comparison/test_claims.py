import pytest

from elm_trainer.comparison.report import paper_claims


GIBBERISH, SAME, UNFORGETTING, ONLY = range(4)


def row(r_ppl=1.2, pmi=-0.3, likelihood=-0.3, *, width=0.0, states=("holds", "holds", "holds"), failed=()):
    def change(value):
        return {"change": {"value": value, "low": value - width, "high": value + width}}

    return {
        "figures": {
            "fluency.greedy.r_ppl": change(r_ppl),
            "multiple_choice.capitals.pmi": change(pmi),
            "multiple_choice.capitals.log_likelihood": change(likelihood),
        },
        "verdict": {
            name: {"state": state, "checks": []}
            for name, state in zip(("innocence", "seamlessness", "specificity"), states, strict=True)
        },
        "failed": dict.fromkeys(failed, "NaN"),
    }


def verdicts(rows, claim):
    found = paper_claims(rows, "capitals", "updates")[claim]
    return found["held"], found["certain"]


@pytest.mark.parametrize(
    ("rmu", "elm", "width", "expected"),
    [
        (20.0, 1.2, 0.0, (True, True)),
        (1.3, 1.2, 0.0, (False, True)),
        (20.0, 1.6, 0.0, (False, True)),
        (1.6, 1.2, 0.2, (True, False)),
        (1.4, 1.2, 0.2, (False, False)),
        (20.0, 1.6, 0.2, (False, False)),
    ],
)
def test_gibberish_is_a_claim_about_rmu_and_elm(rmu, elm, width, expected):
    assert verdicts({"rmu": row(r_ppl=rmu, width=width), "elm": row(r_ppl=elm, width=width)}, GIBBERISH) == expected


@pytest.mark.parametrize(
    ("pmi", "likelihood", "width", "expected"),
    [
        (0.0, -0.02, 0.01, (True, True)),
        (-0.04, 0.1, 0.0, (True, True)),
        (0.0, -0.2, 0.05, (False, True)),
        (0.0, -0.02, 0.1, (True, False)),
    ],
)
def test_whp_answers_as_before_if_neither_rule_falls_much(pmi, likelihood, width, expected):
    assert verdicts({"whp": row(pmi=pmi, likelihood=likelihood, width=width)}, SAME) == expected


@pytest.mark.parametrize(
    ("r_ppl", "fall", "expected"), [(1.0, -0.1, True), (1.0, -0.15, True), (1.0, -0.2, False), (2.0, -0.1, False)]
)
def test_repnoise_forgets_little_if_less_than_half_of_what_elm_does(r_ppl, fall, expected):
    assert verdicts({"repnoise": row(r_ppl=r_ppl, pmi=fall), "elm": row(pmi=-0.3)}, UNFORGETTING) == (expected, True)


GOOD, POOR, DOUBTFUL = ("holds",) * 3, ("holds", "fails", "uncertain"), ("holds", "uncertain", "holds")


@pytest.mark.parametrize(
    ("elm", "rival", "expected"),
    [
        (GOOD, POOR, (True, True)),
        (GOOD, DOUBTFUL, (True, False)),
        (GOOD, GOOD, (False, True)),
        (POOR, POOR, (False, True)),
        (DOUBTFUL, POOR, (False, False)),
        (DOUBTFUL, GOOD, (False, True)),
    ],
)
def test_elm_is_the_only_good_one_if_all_criteria_hold_for_it_and_for_no_rival(elm, rival, expected):
    assert verdicts({"elm": row(states=elm), "npo": row(states=rival)}, ONLY) == expected


def test_a_claim_about_a_method_that_failed_or_is_missing_is_not_measured():
    rows = {"elm": row(), "rmu": row(failed=["1"])}
    assert [claim["held"] for claim in paper_claims(rows, "capitals", "seconds")] == [None] * 4
    assert {claim["budget"] for claim in paper_claims(rows, "capitals", "seconds")} == {"seconds"}
