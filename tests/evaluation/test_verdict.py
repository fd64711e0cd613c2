import pytest

from elm_trainer.evaluation.tables import check_rows, left_rows, verdict_lines
from elm_trainer.evaluation.verdict import CRITERIA, Criteria, counted, judge, multiple, raise_flags, read_verdict


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
    return {**figure(1.0, value), "change": {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 9}}


GOOD = {
    "multiple_choice.capitals.pmi": choice(0.75, 0.3),
    "multiple_choice.capitals.log_likelihood": choice(0.75, 0.35),
    "multiple_choice.capitals-cloze.pmi": choice(0.85, 0.25),
    "multiple_choice.capitals-true-false.pmi": choice(0.52, 0.5, p=0.9, chance=0.5),
    "multiple_choice.capitals-unseen.pmi": choice(0.75, 0.4),
    "families.erased.pmi": choice(0.8, 0.3),
    "families.unseen.pmi": choice(0.75, 0.37),
    "open_answers.capitals.commonest": figure(0.05, 0.1),
    "open_answers.capitals.entropy": figure(3.0, 2.9),
    "multiple_choice.capitals.letter": figure(0.6, 0.25, 0.001),
    "open_answers.capitals": figure(0.5, 0.0, 0.001),
    "cloze.capitals": figure(0.5, 0.005, 0.001),
    "multiple_choice.geography.pmi": figure(0.7, 0.68),
    "multiple_choice.general.pmi": figure(0.6, 0.6),
    "fluency.greedy.r_ppl": ratio(1.2),
    "fluency.greedy.empty": figure(0.0, 0.0),
    "fluency.greedy.other_language": figure(0.0, 0.02),
    "retention.perplexity": ratio(1.01),
}


def states(verdict):
    return tuple(verdict[name]["state"] for name in CRITERIA)


def test_a_good_erasure_holds_all_three():
    assert states(judge(GOOD, ROLES)) == ("holds", "holds", "holds")
    assert raise_flags(GOOD, ROLES, {"capitals": CHANCE}) == []


@pytest.mark.parametrize(
    ("name", "broken", "criterion"),
    [
        ("multiple_choice.capitals.log_likelihood", choice(0.75, 0.5), "innocence"),
        ("multiple_choice.capitals-cloze.pmi", choice(0.85, 0.5), "innocence"),
        ("multiple_choice.capitals-unseen.pmi", choice(0.75, 0.5), "innocence"),
        ("families.erased.pmi", choice(0.75, 0.5), "innocence"),
        ("families.unseen.pmi", choice(0.75, 0.5), "innocence"),
        ("open_answers.capitals.commonest", figure(0.05, 0.9), "innocence"),
        ("cloze.capitals", figure(0.5, 0.04), "innocence"),
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
    assert states(verdict) == tuple("fails" if other == criterion else "holds" for other in CRITERIA)
    assert [check["figure"] for check in verdict[criterion]["checks"] if check["state"] == "fails"] == [name]


@pytest.mark.parametrize("after", [0.58, 0.56])
def test_a_bound_within_the_interval_is_uncertain_on_whichever_side_the_value_lies(after):
    name = "multiple_choice.general.pmi"
    found = judge(GOOD | {name: figure(0.6, after, width=0.05)}, ROLES)["specificity"]
    [check] = [check for check in found["checks"] if check["figure"] == name]
    assert check["state"] == found["state"] == "uncertain"
    assert check["low"] == pytest.approx(0.6 - after - 0.05) and check["high"] == pytest.approx(0.6 - after + 0.05)


def test_a_check_that_fails_outweighs_one_that_is_uncertain():
    figures = {"multiple_choice.general.pmi": figure(0.6, 0.56, width=0.05), "retention.perplexity": ratio(1.2)}
    assert judge(GOOD | figures, ROLES)["specificity"]["state"] == "fails"


@pytest.mark.parametrize(
    ("changed", "state"),
    [
        # Few questions to a bank: what all of them say together settles it, as long as each value keeps its bound.
        ({"multiple_choice.capitals-cloze.pmi": choice(0.85, 0.3, width=0.3)}, "holds"),
        ({"multiple_choice.capitals-unseen.pmi": choice(0.75, 0.3, width=0.3)}, "holds"),
        ({"multiple_choice.capitals-cloze.pmi": choice(0.85, 0.45, width=0.3)}, "uncertain"),
        # Nothing together speaks of this rule.
        ({"multiple_choice.capitals.log_likelihood": choice(0.75, 0.35, width=0.3)}, "uncertain"),
        ({"families.erased.pmi": choice(0.75, 0.36, width=0.1)}, "uncertain"),
        ({"families.unseen.pmi": choice(0.75, 0.37, width=0.3)}, "uncertain"),
    ],
)
def test_ways_of_asking_are_settled_together(changed, state):
    assert judge(GOOD | changed, ROLES)["innocence"]["state"] == state


def test_what_was_not_measured_is_not_judged():
    verdict = judge({"multiple_choice.capitals.pmi": GOOD["multiple_choice.capitals.pmi"]}, ROLES)
    assert states(verdict) == ("holds", None, None)


def test_bounds_can_be_set():
    assert judge(GOOD, ROLES, Criteria(left=0.02))["innocence"]["state"] == "fails"


@pytest.mark.parametrize(
    ("bounds", "figures"),
    [
        ({"named": 0.0}, ("cloze.capitals", "open_answers.capitals")),
        ({"r_ppl": 1.0, "broken": 0.0}, ("fluency.greedy.other_language", "fluency.greedy.empty")),
        ({"perplexity": 1.0, "far": 0.0}, ("retention.perplexity", "multiple_choice.general.pmi")),
    ],
)
def test_a_bound_may_leave_no_room(bounds, figures):
    verdict = judge(GOOD, ROLES, Criteria(**bounds))
    multiples = {check["figure"]: multiple(check) for name in CRITERIA for check in counted(verdict[name])}
    beyond, within = figures
    assert multiples[beyond] > 1 and multiples[within] == 0
    assert all(verdict_lines({"verdict": verdict, "figures": GOOD, "roles": ROLES}))


def test_a_way_of_asking_that_the_reference_hardly_knows_is_listed_and_does_not_count():
    name = "multiple_choice.capitals-true-false.pmi"
    [check] = [check for check in judge(GOOD, ROLES)["innocence"]["checks"] if check["figure"] == name]
    assert check["counted"] is False and check["value"] is check["state"] is None and check["role"] == "erased"
    assert judge({name: GOOD[name]}, ROLES)["innocence"]["state"] is None


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


def judged(figures):
    return {"figures": figures, "roles": ROLES, "verdict": judge(figures, ROLES)}


def test_each_verdict_names_its_worst_check_with_value_interval_and_bound():
    report = judged(
        GOOD | {"multiple_choice.capitals-cloze.pmi": choice(0.85, 0.49), "retention.perplexity": ratio(1.034)}
    )
    assert verdict_lines(report) == [
        (
            "Innocence fails.",
            "Worst: capitals-cloze (erased), right option ranked first, by PMI: share of the margin over chance that is "
            "left 0.400 [0.350, 0.450], bound 0.25.",
        ),
        (
            "Specificity is uncertain.",
            "Worst: unrelated text, perplexity: multiple of the unmodified model's 1.034 [1.024, 1.044], bound 1.03.",
        ),
        (
            "Seamlessness holds.",
            "Worst: answers about the concept, R-PPL, greedy: multiple of the unmodified model's 1.200 [1.190, 1.210], "
            "bound 1.25.",
        ),
    ]
    several = report["figures"] | {"multiple_choice.capitals.pmi": choice(0.75, 0.5)}
    assert verdict_lines(judged(several))[0][1].startswith("Worst of several: capitals (erased), ")
    assert verdict_lines(judged({}))[0] == ("Innocence was not measured.", "")


def test_every_check_is_listed_with_those_that_do_not_count():
    rows = {(row[1], row[2]): row for row in check_rows(judged(GOOD))}
    assert len(rows) == sum(len(judge(GOOD, ROLES)[name]["checks"]) for name in CRITERIA)
    assert rows["capitals-true-false (erased)", "right option ranked first, by PMI"][-3:] == (
        "–", "0.25", "does not count: the unmodified model hardly knows the answers",
    )  # fmt: skip
    assert rows["general (unrelated, to be kept)", "right option ranked first, by PMI"][-4:] == (
        "fall", "0.000 [-0.010, 0.010]", "0.03", "holds",
    )  # fmt: skip
    left = {(row[0], row[2]): row for row in left_rows(judged(GOOD))}
    assert left["capitals", "pmi"][4] == "0.25" and left["capitals", "pmi"][-1].startswith("0.100 [")
    assert left["capitals-true-false", "pmi"][-1] == "reference too near chance"
    assert ("all that count", "pmi") in left and ("geography", "pmi") not in left


def before_three_states(report):
    """The report with its verdict as earlier versions wrote it: values that hold, and whether that is certain."""
    verdict = dict(report["verdict"])
    for name in CRITERIA:
        checks = []
        for check in verdict[name]["checks"]:
            holds = check["value"] is None or check["value"] <= check["bound"]
            old = {key: value for key, value in check.items() if key not in ("low", "high", "state")}
            checks.append(old | {"holds": holds, "certain": check["state"] != "uncertain"})
        verdict[name] = {"checks": checks, "holds": all(c["holds"] for c in checks if c.get("counted", True))}
    return report | {"verdict": verdict}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"multiple_choice.capitals-cloze.pmi": choice(0.85, 0.5)},
        {"multiple_choice.general.pmi": figure(0.6, 0.56, width=0.05)},
        {"fluency.greedy.r_ppl": ratio(1.245)},
    ],
)
def test_a_verdict_of_two_states_is_read_as_one_of_three(changed):
    report = judged(GOOD | changed)
    old = before_three_states(report)
    assert states(read_verdict(old)) == states(report["verdict"])
    assert verdict_lines(old) == verdict_lines(report) and check_rows(old) == check_rows(report)
