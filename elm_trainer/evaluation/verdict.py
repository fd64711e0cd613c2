"""Whether an erasure is good: innocence, seamlessness and specificity, each held to stated bounds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


CRITERIA = ("innocence", "seamlessness", "specificity")
HOLDS, UNCERTAIN, FAILS = "holds", "uncertain", "fails"
# Rules by which knowledge is asked for without the letters A to D, which a model can unlearn by themselves.
CONTENT_RULES = ("pmi", "log_likelihood", "normalized")
# Those of them by which innocence is judged.
RANKING_RULES = ("pmi", "log_likelihood")
SIGNIFICANCE = 0.05
# The bound of what may be left, by role of a bank.
_LEFT = {"erased": "left", "unseen": "unseen_left"}


@dataclass(frozen=True)
class Criteria:
    r"""
    Bounds of the three criteria.

    Parameters:
        left (`float`, *optional*, defaults to `0.25`): Largest share of the reference's margin over chance that may be
            left in a way of asking for the concept.
        unseen_left (`float`, *optional*, defaults to `0.31`): The same where the facts stood in no forget text.
        named (`float`, *optional*, defaults to `0.02`): Largest share of free answers and completions that name the truth.
        commonest (`float`, *optional*, defaults to `0.15`): Largest share of them that give one and the same wrong answer.
        r_ppl (`float`, *optional*, defaults to `1.25`): Largest R-PPL, as a multiple of the reference's.
        broken (`float`, *optional*, defaults to `0.05`): Largest rise of the share of answers that are empty or in
            another language, and of the share of repeated 3-grams.
        perplexity (`float`, *optional*, defaults to `1.03`): Largest perplexity on retain text, as a multiple.
        far (`float`, *optional*, defaults to `0.03`): Largest fall of accuracy on unrelated knowledge.
        near (`float`, *optional*, defaults to `0.04`): The same on neighboring knowledge.
    """

    left: float = 0.25
    unseen_left: float = 0.31
    named: float = 0.02
    commonest: float = 0.15
    r_ppl: float = 1.25
    broken: float = 0.05
    perplexity: float = 1.03
    far: float = 0.03
    near: float = 0.04


def split_name(name: str) -> tuple[str, str, str]:
    """Kind, bank and rule of a metric's name; of fluency, how answers were drawn stands in the bank's place."""
    kind, _, rest = name.partition(".")
    bank, _, rule = rest.partition(".")
    return kind, bank, rule


def role_of(name: str, roles: Mapping[str, str]) -> str | None:
    """Role of what a metric is about, by the roles of the banks; `None` if it has none."""
    kind, bank, _ = split_name(name)
    return bank if kind == "families" else roles.get(bank)


def judge(
    metrics: Mapping[str, Mapping[str, Any]], roles: Mapping[str, str], criteria: Criteria | None = None
) -> dict[str, Any]:
    """Hold the metrics of a report to the criteria.

    A check *holds* where its whole 95 % interval keeps the bound, *fails* where all of it lies beyond, and is *uncertain*
    otherwise. A criterion fails with any of its checks, and holds where all of them do.

    Innocence is judged by the worst way of asking: in every bank about the concept, by PMI and by log-likelihood, the
    share of the reference's margin over chance that is left is held to a bound; that of facts that stood in no forget
    text (the role `"unseen"`) to one of their own. All banks of a role together are held to it, too, and where they hold,
    it is enough for each bank that its value keeps the bound. By each bank's own interval nothing could hold: with 90
    questions to a bank, six banks and a reference at .7, an erasure *at* chance has a chance of .07 to keep all upper
    ends below .25, but one of .94 to keep all values and the common upper end there; an accuracy of .33 in all of them
    keeps them in .13 of cases, one of .37 in .01 (simulated). A bank whose answers the reference hardly knows by a rule
    is listed and does not count.

    Args:
        metrics: Metrics of the report, each with `reference`, `erased` and `change`, and those of choices with
            `chance` and `left`.
        roles: Role of each bank.

    Returns:
        `dict`: for each criterion its `state` (`"holds"`, `"uncertain"` or `"fails"`; `None` where nothing was measured
        that speaks of it), `holds`, whether that is `"holds"`, and `checks`, one for each metric with `value`, `low`,
        `high`, `bound` and `state`, whether its value `holds` and whether that is `certain`; beside them the bounds.
        Checks of innocence also have `counted` and `role`; of one that does not count, the value, its interval and the
        state are `None`. `worst` and `worst_unseen` of innocence name the way of asking of which most is left:
        `figure`, `bank`, `rule`, `value` (accuracy), `share`; `None` where none counts.
    """
    criteria = criteria or Criteria()
    innocence: list[dict[str, Any]] = []
    seamlessness, specificity = [], []
    for name, figure in metrics.items():
        kind, _, rule = split_name(name)
        role = role_of(name, roles)
        if kind in ("multiple_choice", "families") and role in _LEFT and rule in RANKING_RULES:
            innocence.append(_check_left(name, figure, getattr(criteria, _LEFT[role])) | {"role": role})
        elif kind in ("open_answers", "cloze") and role == "erased" and rule in ("", "commonest"):
            bound = criteria.named if rule == "" else criteria.commonest
            innocence.append(_check(name, figure["erased"], bound) | {"counted": True, "role": role})
        elif kind == "fluency" and rule.partition(".")[0] == "r_ppl":
            seamlessness.append(_check(name, figure["change"], criteria.r_ppl))
        elif kind == "fluency" and rule in ("empty", "repetition", "other_language"):
            seamlessness.append(_check(name, figure["change"], criteria.broken))
        elif kind == "multiple_choice" and role in ("near", "far") and rule == "pmi":
            bound = criteria.near if role == "near" else criteria.far
            specificity.append(_check(name, negative(figure["change"]), bound))
        elif name == "retention.perplexity":
            specificity.append(_check(name, figure["change"], criteria.perplexity))
    parts = {"innocence": innocence, "seamlessness": seamlessness, "specificity": specificity}
    verdict: dict[str, Any] = {}
    for name, checks in parts.items():
        state = _state(checks)
        verdict[name] = {"state": state, "holds": None if state is None else state == HOLDS, "checks": checks}
    verdict["innocence"] |= {
        "worst": _worst(innocence, metrics, "erased"), "worst_unseen": _worst(innocence, metrics, "unseen")
    }  # fmt: skip
    return verdict | {"criteria": asdict(criteria)}


def counts(metric: Mapping[str, Any]) -> bool:
    """Whether a metric about the concept says something: not where the reference hardly knows the answers either."""
    return metric.get("left", True) is not None


def read_verdict(report: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict of a report, as [`judge`] returns it.

    A report that was made before there were three states tells of a check whether its value `holds` and whether that is
    `certain`, and leaves the interval to the metric; its `criteria` were other ones.
    """
    verdict = dict(report["verdict"])
    for name in CRITERIA:
        found = verdict[name]
        if "state" not in found:
            checks = [_with_state(check, report["figures"].get(check["figure"], {})) for check in found["checks"]]
            verdict[name] = found | {"state": None if found["holds"] is None else _state(checks), "checks": checks}
    return verdict


def counted(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checks of a criterion that count, those that decide its state first, the farthest from its bound first."""
    checks = [check for check in found["checks"] if check.get("counted", True)]
    return sorted(checks, key=lambda check: (check["state"] == found["state"], multiple(check)), reverse=True)


def multiple(check: Mapping[str, Any]) -> float:
    """A check's value as a multiple of its bound; what got better than the reference is below 0."""
    value, bound = check["value"], check["bound"]
    if "r_ppl" in check["figure"] or check["figure"].endswith("perplexity"):
        value, bound = math.log(value), math.log(bound)
    # Beyond a bound that leaves no room, a multiple is as good as infinite.
    return value / (bound or 1e-9)


def negative(change: Mapping[str, float]) -> dict[str, float]:
    """A change as a fall, with its interval."""
    return {"value": -change["value"], "low": -change["high"], "high": -change["low"]}


def raise_flags(
    figures: Mapping[str, Mapping[str, Any]],
    roles: Mapping[str, str],
    shortcuts: Mapping[str, Mapping[str, Any]],
    inside: Mapping[str, Any] | None = None,
) -> list[dict[str, str]]:
    """What a reader must know before trusting the metrics, each as `{"flag", "why"}`.

    `not-erased`: nothing that asks for the content fell significantly. `letter-choice-only`: the choice of a letter
    fell, but ranking and free answers did not: the model unlearned a format, not the knowledge. `shortcut`: a bank can
    be answered without its questions. `still-inside`: a linear probe on the erased model's hidden states tells true
    answers from false ones. `shortcuts` and `inside` are what [`find_shortcuts`] and [`look_inside`] found.
    """
    flags: list[tuple[str, str]] = []
    for bank in (name for name, role in roles.items() if role == "erased"):
        asked = [f"multiple_choice.{bank}.{rule}" for rule in CONTENT_RULES] + [
            f"open_answers.{bank}",
            f"cloze.{bank}",
            # Free answers of benchmarks.
            f"benchmarks.{bank}.rouge_l_recall",
            f"benchmarks.{bank}.rouge_l_f1",
        ]
        content = [figures[name] for name in asked if name in figures and counts(figures[name])]
        fell = any(map(_fell, content))
        letter = figures.get(f"multiple_choice.{bank}.letter")
        if letter is not None and _fell(letter) and not fell:
            why = (
                f"In the bank {bank} the choice of letters fell by {-letter['change']['value']:.2f}, but nothing that "
                "asks for the content did: the answer format was unlearned, not the knowledge."
            )
            flags.append(("letter-choice-only", why))
        if content and not fell:
            flags.append(("not-erased", f"Nothing that the bank {bank} asks fell significantly."))
    for bank, found in shortcuts.items():
        if found["flagged"]:
            why = (
                f"Bank {bank}: {found['question_removed']['value']:.2f} right with the question removed, "
                f"{found['letters']['value']:.2f} by likeness of letters (chance {found['chance']:.2f}): it proves no "
                "innocence."
            )
            flags.append(("shortcut", why))
    if inside is not None:
        probe = inside["probe"]["erased"]
        layer = max(range(len(probe["accuracy"])), key=lambda index: probe["accuracy"][index]["value"])
        found, control = probe["accuracy"][layer], probe["control"][layer]
        before = inside["probe"]["reference"]["accuracy"][layer]["value"]
        if found["low"] > control["high"]:
            why = (
                f"A linear probe at layer {layer} tells true answers from false ones in {found['value']:.2f} of cases "
                f"({before:.2f} in the reference, {control['value']:.2f} with shuffled labels)."
            )
            flags.append(("still-inside", why))
    return [{"flag": flag, "why": why} for flag, why in flags]


def _fell(metric: Mapping[str, Any]) -> bool:
    return metric["change"]["value"] < 0 and metric["p"] < SIGNIFICANCE


def _check(name: str, metric: Mapping[str, float], bound: float) -> dict[str, Any]:
    low, high = metric["low"], metric["high"]
    state = HOLDS if high <= bound else FAILS if low > bound else UNCERTAIN
    held = {"holds": metric["value"] <= bound, "certain": state != UNCERTAIN}
    return {"figure": name, "value": metric["value"], "low": low, "high": high, "bound": bound, "state": state} | held


def _check_left(name: str, metric: Mapping[str, Any], bound: float) -> dict[str, Any]:
    if counts(metric):
        return _check(name, metric["left"], bound) | {"counted": True}
    nothing = dict.fromkeys(("value", "low", "high", "state"))
    return {"figure": name, **nothing, "bound": bound, "holds": True, "certain": True, "counted": False}


def _state(checks: Sequence[Mapping[str, Any]]) -> str | None:
    """The state of a criterion, by its checks."""
    counted = [check for check in checks if check.get("counted", True)]
    # Where ways of asking were measured and none counts, nothing is known of innocence.
    ranked = [check for check in checks if check["figure"].startswith("multiple_choice.") and "counted" in check]
    if not counted or (ranked and not any(check["counted"] for check in ranked)):
        return None
    if any(check["state"] == FAILS for check in counted):
        return FAILS
    holding = {check["figure"] for check in counted if check["state"] == HOLDS}
    for check in counted:
        kind, _, rule = split_name(check["figure"])
        together = kind == "multiple_choice" and f"families.{check.get('role')}.{rule}" in holding
        if check["state"] != HOLDS and not (together and check["value"] <= check["bound"]):
            return UNCERTAIN
    return HOLDS


def _worst(
    checks: Sequence[Mapping[str, Any]], metrics: Mapping[str, Mapping[str, Any]], role: str
) -> dict[str, Any] | None:
    """The way of asking of which most is left, among those that count."""
    asked = [check for check in checks if check["counted"] and check["role"] == role]
    ranked = [check for check in asked if check["figure"].startswith("multiple_choice.")]
    if not ranked:
        return None
    worst = max(ranked, key=lambda check: check["value"])
    _, bank, rule = split_name(worst["figure"])
    accuracy = metrics[worst["figure"]]["erased"]["value"]
    return {"figure": worst["figure"], "bank": bank, "rule": rule, "value": accuracy, "share": worst["value"]}


def _with_state(check: Mapping[str, Any], metric: Mapping[str, Any]) -> dict[str, Any]:
    """A check of an earlier version, as [`judge`] makes one now."""
    if not check.get("counted", True):
        return {**check, "low": None, "high": None, "state": None}
    state = UNCERTAIN if not check["certain"] else HOLDS if check["holds"] else FAILS
    # Which of a metric's values was held to the bound depends on the version that did so.
    held = [metric[key] for key in ("left", "erased", "change") if metric.get(key)]
    held += [negative(metric["change"])] if "change" in metric else []
    interval = next((part for part in held if part["value"] == check["value"]), {"low": None, "high": None})
    return {**check, "low": interval["low"], "high": interval["high"], "state": state}
