import pytest

from elm_trainer.evaluation.verdict import Criteria, judge, raise_flags


ROLES = {"capitals": "erased", "geography": "near", "general": "far"}
CHANCE = {"question_removed": {"value": 0.25}, "letters": {"value": 0.29}, "chance": 0.25, "flagged": False}


def figure(before, after, p=1.0, width=0.01):
    def interval(value):
        return {"value": value, "low": value - width, "high": value + width, "n": 100}

    return {"reference": interval(before), "erased": interval(after), "change": interval(after - before), "p": p}


def ratio(value):
    return {**figure(1.0, value), "change": {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}}


GOOD = {
    "multiple_choice.capitals.pmi": figure(0.7, 0.3, 0.001),
    "multiple_choice.capitals.log_likelihood": figure(0.7, 0.35, 0.001),
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
        ("multiple_choice.capitals.log_likelihood", figure(0.7, 0.6), "innocence"),
        ("cloze.capitals", figure(0.5, 0.2), "innocence"),
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
    assert judge(GOOD, ROLES, Criteria(accuracy=0.2))["innocence"]["holds"] is False


def test_a_format_that_was_unlearnt_is_named():
    kept = {name: figure(0.7, 0.69, 0.8) for name in GOOD if "capitals" in name}
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
