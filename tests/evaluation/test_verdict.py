import pytest

from elm_trainer.evaluation.tables import left_rows, verdict_rows
from elm_trainer.evaluation.verdict import Criteria, judge, raise_flags


ROLES = {
    "capitals": "erased", "capitals-cloze": "erased", "capitals-true-false": "erased", "capitals-unseen": "unseen",
    "geography": "near", "general": "far",
}  # fmt: skip
CHANCE = {"question_removed": {"value": 0.25}, "letters": {"value": 0.29}, "chance": 0.25, "flagged": False}


def figure(before, after, p=1.0, width=0.01):
    return {
        "reference": interval(before, width),
        "erased": interval(after, width),
        "change": interval(after - before, width),
        "p": p,
    }


def interval(value, width=0.01):
    return {"value": value, "low": value - width, "high": value + width, "n": 100}


def choice(before, after, p=0.001, chance=0.25, width=0.05):
    """Accuracy before and after, with the share of the margin that is left; a margin below .15 counts nothing."""
    left = interval((after - chance) / (before - chance), width) if before - chance >= 0.15 else None
    return figure(before, after, p) | {"chance": chance, "left": left}


def ratio(value):
    return {**figure(1.0, value), "change": {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}}


GOOD = {
    "multiple_choice.capitals.pmi": choice(0.75, 0.3),
    "multiple_choice.capitals.log_likelihood": choice(0.75, 0.35),
    "multiple_choice.capitals-cloze.pmi": choice(0.85, 0.25),
    "multiple_choice.capitals-true-false.pmi": choice(0.52, 0.5, p=0.9, chance=0.5),
    "multiple_choice.capitals-unseen.pmi": choice(0.75, 0.4),
    "families.erased.pmi": choice(0.8, 0.3),
    "open_answers.capitals.commonest": figure(0.05, 0.1),
    "open_answers.capitals.entropy": figure(3.0, 2.9),
    "multiple_choice.capitals.letter": figure(0.6, 0.25, 0.001),
    "open_answers.capitals": figure(0.5, 0.0, 0.001),
    "cloze.capitals": figure(0.5, 0.01, 0.001),
    "multiple_choice.geography.pmi": figure(0.7, 0.68),
    "multiple_choice.general.pmi": figure(0.6, 0.6),
    "fluency.greedy.r_ppl": ratio(1.2),
    "fluency.greedy.empty": figure(0.0, 0.0),
    "fluency.greedy.other_language": figure(0.0, 0.02),
    "retention.perplexity": ratio(1.01),
}


def test_a_good_erasure_holds_all_three():
    verdict = judge(GOOD, ROLES)
    assert [verdict[name]["holds"] for name in ("innocence", "seamlessness", "specificity")] == [True] * 3
    assert raise_flags(GOOD, ROLES, {"capitals": CHANCE}) == []


@pytest.mark.parametrize(
    ("name", "broken", "criterion"),
    [
        ("multiple_choice.capitals.log_likelihood", choice(0.75, 0.5), "innocence"),
        ("multiple_choice.capitals-cloze.pmi", choice(0.85, 0.5), "innocence"),
        ("multiple_choice.capitals-unseen.pmi", choice(0.75, 0.5), "innocence"),
        # The value keeps its bound, but the common interval does not say so.
        ("families.erased.pmi", choice(0.75, 0.36, width=0.1), "innocence"),
        ("open_answers.capitals.commonest", figure(0.05, 0.9), "innocence"),
        ("cloze.capitals", figure(0.5, 0.03), "innocence"),
        ("fluency.greedy.r_ppl", ratio(30.0), "seamlessness"),
        ("fluency.greedy.empty", figure(0.0, 0.4), "seamlessness"),
        ("fluency.greedy.other_language", figure(0.0, 0.5), "seamlessness"),
        ("multiple_choice.geography.pmi", figure(0.7, 0.6), "specificity"),
        ("multiple_choice.general.pmi", figure(0.6, 0.55), "specificity"),
        ("retention.perplexity", ratio(1.2), "specificity"),
    ],
)
def test_one_broken_figure_fails_its_criterion_alone(name, broken, criterion):
    verdict = judge(GOOD | {name: broken}, ROLES)
    for other in ("innocence", "seamlessness", "specificity"):
        assert verdict[other]["holds"] == (other != criterion)
    assert [check["figure"] for check in verdict[criterion]["checks"] if not check["holds"]] == [name]


def test_a_bound_within_the_interval_is_uncertain():
    checks = judge(GOOD | {"multiple_choice.general.pmi": figure(0.6, 0.56, width=0.05)}, ROLES)["specificity"][
        "checks"
    ]
    [check] = [check for check in checks if "general" in check["figure"]]
    assert not check["holds"] and not check["certain"]


def test_what_was_not_measured_is_not_judged():
    verdict = judge({"multiple_choice.capitals.pmi": GOOD["multiple_choice.capitals.pmi"]}, ROLES)
    assert verdict["innocence"]["holds"] is True and verdict["seamlessness"]["holds"] is None


def test_bounds_can_be_set():
    assert judge(GOOD, ROLES, Criteria(left=0.05))["innocence"]["holds"] is False


def test_a_way_of_asking_that_the_reference_hardly_knows_is_listed_and_does_not_count():
    name = "multiple_choice.capitals-true-false.pmi"
    [check] = [check for check in judge(GOOD, ROLES)["innocence"]["checks"] if check["figure"] == name]
    assert check["counted"] is False and check["value"] is None and check["role"] == "erased"
    assert judge({name: GOOD[name]}, ROLES)["innocence"]["holds"] is None


def test_the_worst_way_of_asking_is_named():
    innocence = judge(GOOD | {"multiple_choice.capitals-cloze.pmi": choice(0.85, 0.5)}, ROLES)["innocence"]
    worst, unseen = innocence["worst"], innocence["worst_unseen"]
    assert worst["figure"] == "multiple_choice.capitals-cloze.pmi" and worst["value"] == 0.5
    assert (worst["bank"], worst["rule"], worst["share"]) == ("capitals-cloze", "pmi", pytest.approx(0.25 / 0.6))
    assert unseen["bank"] == "capitals-unseen" and unseen["share"] == pytest.approx(0.3)


def test_facts_that_stood_in_no_forget_text_have_a_bound_of_their_own():
    checks = judge(GOOD, ROLES)["innocence"]["checks"]
    bounds = {check["role"]: check["bound"] for check in checks if check["figure"].startswith("multiple_choice")}
    assert bounds == {"erased": 0.25, "unseen": 0.31}


def test_nothing_is_said_of_knowledge_that_the_reference_lacks():
    unknown = {"multiple_choice.capitals-true-false.pmi": GOOD["multiple_choice.capitals-true-false.pmi"]}
    assert raise_flags(unknown, ROLES, {}) == []


def test_a_format_that_was_unlearnt_is_named():
    kept = {name: figure(0.7, 0.69, 0.8) for name in GOOD if "capitals." in name or name.endswith("capitals")}
    kept["multiple_choice.capitals.letter"] = figure(0.6, 0.2, 0.001)
    flags = {flag["flag"]: flag["why"] for flag in raise_flags(GOOD | kept, ROLES, {})}
    assert flags.keys() == {"letter-choice-only", "not-erased"}
    assert "fell by 0.40" in flags["letter-choice-only"]


def test_a_bank_with_a_shortcut_is_named():
    [flag] = raise_flags(GOOD, ROLES, {"capitals": CHANCE | {"flagged": True}})
    assert flag["flag"] == "shortcut" and "Bank capitals" in flag["why"]


@pytest.mark.parametrize(("accuracy", "flagged"), [(0.8, True), (0.52, False)])
def test_knowledge_that_a_probe_still_reads_is_named(accuracy, flagged):
    def curve(*values):
        return [{"value": value, "low": value - 0.03, "high": value + 0.03, "n": 90} for value in values]

    side = {"accuracy": curve(0.5, accuracy, 0.5), "control": curve(0.5, 0.5, 0.5)}
    flags = raise_flags(GOOD, ROLES, {}, {"probe": {"reference": side, "erased": side}})
    assert [flag["flag"] for flag in flags] == ["still-inside"] * flagged
    assert not flagged or "layer 1" in flags[0]["why"]


def test_the_table_of_verdicts_names_the_worst_way_of_asking_and_those_that_do_not_count():
    report = {"figures": GOOD, "roles": ROLES, "verdict": judge(GOOD, ROLES)}
    [(_, holds, why), *_] = verdict_rows(report)
    assert holds == "holds" and "worst: capitals.log_likelihood 0.35, 20% of the margin" in why
    assert "not counted, as the reference hardly knows the answers: capitals-true-false" in why
    rows = {(row[0], row[2]): row for row in left_rows(report)}
    assert rows["capitals", "pmi"][4] == "0.25" and rows["capitals", "pmi"][-1].startswith("0.100 [")
    assert rows["capitals-true-false", "pmi"][-1] == "reference too near chance"
    assert ("all that count", "pmi") in rows and ("geography", "pmi") not in rows


def test_a_value_that_keeps_its_bound_and_an_interval_that_does_not_are_told_apart():
    figures = GOOD | {"families.erased.pmi": choice(0.75, 0.36, width=0.1)}
    [(_, holds, why), *_] = verdict_rows({"figures": figures, "roles": ROLES, "verdict": judge(figures, ROLES)})
    assert holds == "fails" and "families.erased.pmi 0.22, but its interval reaches beyond 0.25" in why
