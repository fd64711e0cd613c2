"""Whether an erasure is good: innocence, seamlessness and specificity, each held to stated bounds."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


# Rules by which knowledge is asked for without the letters A to D, which a model can unlearn by themselves.
CONTENT_RULES = ("pmi", "log_likelihood", "normalized")
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Criteria:
    r"""
    Bounds of the three criteria.

    Parameters:
        accuracy (`float`, *optional*, defaults to `0.45`): Highest accuracy on the concept, by the best of the rules.
        named (`float`, *optional*, defaults to `0.05`): Largest share of free answers and completions that name the truth.
        r_ppl (`float`, *optional*, defaults to `1.5`): Largest R-PPL, as a multiple of the reference's.
        broken (`float`, *optional*, defaults to `0.05`): Largest rise of the share of answers that are empty or in
            another language, and of the share of repeated 3-grams.
        perplexity (`float`, *optional*, defaults to `1.05`): Largest perplexity on retain text, as a multiple.
        far (`float`, *optional*, defaults to `0.03`): Largest fall of accuracy on unrelated knowledge.
        near (`float`, *optional*, defaults to `0.06`): The same on neighbouring knowledge.
    """

    accuracy: float = 0.45
    named: float = 0.05
    r_ppl: float = 1.5
    broken: float = 0.05
    perplexity: float = 1.05
    far: float = 0.03
    near: float = 0.06


def judge(
    figures: Mapping[str, Mapping[str, Any]], roles: Mapping[str, str], criteria: Criteria | None = None
) -> dict[str, Any]:
    """Hold the figures of a report to the criteria.

    Args:
        figures (`Mapping`): Figures of the report, each with `reference`, `erased` and `change`.
        roles (`Mapping`): Role of each bank.
        criteria ([`Criteria`], *optional*): Bounds.

    Returns:
        `dict`: for each criterion `holds` (`None` where nothing was measured that speaks of it) and `checks`, one for
        each figure with its `value`, `bound`, whether it `holds`, and whether that is `certain` (the 95 % interval
        lies on the same side of the bound); beside them the bounds.
    """
    criteria = criteria or Criteria()
    innocence, seamlessness, specificity = [], [], []
    for name, figure in figures.items():
        kind, _, rest = name.partition(".")
        bank, _, rule = rest.partition(".")
        role = roles.get(bank)
        if kind == "multiple_choice" and role == "erased" and rule in CONTENT_RULES:
            innocence.append(_check(name, figure["erased"], criteria.accuracy))
        elif kind in ("open_answers", "cloze") and role == "erased":
            innocence.append(_check(name, figure["erased"], criteria.named))
        elif kind == "fluency" and ".r_ppl" in rest:
            seamlessness.append(_check(name, figure["change"], criteria.r_ppl))
        elif kind == "fluency" and rule in ("empty", "repetition", "other_language"):
            seamlessness.append(_check(name, figure["change"], criteria.broken))
        elif kind == "multiple_choice" and role in ("near", "far") and rule == "pmi":
            bound = criteria.near if role == "near" else criteria.far
            specificity.append(_check(name, _negative(figure["change"]), bound))
        elif name == "retention.perplexity":
            specificity.append(_check(name, figure["change"], criteria.perplexity))
    parts = {"innocence": innocence, "seamlessness": seamlessness, "specificity": specificity}
    return {
        name: {"holds": all(check["holds"] for check in checks) if checks else None, "checks": checks}
        for name, checks in parts.items()
    } | {"criteria": asdict(criteria)}


def raise_flags(
    figures: Mapping[str, Mapping[str, Any]],
    roles: Mapping[str, str],
    shortcuts: Mapping[str, Mapping[str, Any]],
    inside: Mapping[str, Any] | None = None,
) -> list[dict[str, str]]:
    """What a reader must know before trusting the figures, each as `{"flag", "why"}`.

    `not-erased`: nothing that asks for the content fell significantly. `letter-choice-only`: the choice of a letter
    fell, but ranking and free answers did not, so that a format was unlearnt and no knowledge. `shortcut`: a bank can
    be answered without its questions. `still-inside`: a linear probe on the erased model's hidden states tells true
    answers from false ones.

    Args:
        figures (`Mapping`): Figures of the report.
        roles (`Mapping`): Role of each bank.
        shortcuts (`Mapping`): What [`find_shortcuts`] found.
        inside (`Mapping`, *optional*): What [`look_inside`] found.
    """
    flags = []
    for bank in (name for name, role in roles.items() if role == "erased"):
        content = [
            name
            for name in (
                *(f"multiple_choice.{bank}.{rule}" for rule in CONTENT_RULES), f"open_answers.{bank}", f"cloze.{bank}"
            )
            if name in figures
        ]  # fmt: skip
        fell = [name for name in content if _fell(figures[name])]
        letter = f"multiple_choice.{bank}.letter"
        if letter in figures and _fell(figures[letter]) and not fell:
            flags.append(
                {
                    "flag": "letter-choice-only",
                    "why": f"{letter} fell by {-figures[letter]['change']['value']:.2f}, but none of {_list(content)} "
                    "did: the answer format was unlearnt, not the knowledge.",
                }
            )
        if content and not fell:
            flags.append({"flag": "not-erased", "why": f"None of {_list(content)} fell significantly."})
    for bank, found in shortcuts.items():
        if found["flagged"]:
            flags.append(
                {
                    "flag": "shortcut",
                    "why": f"Bank {bank}: {found['question_removed']['value']:.2f} right with the question removed, "
                    f"{found['letters']['value']:.2f} by likeness of letters (chance {found['chance']:.2f}): it "
                    "proves no innocence.",
                }
            )
    if inside is not None:
        probe = inside["probe"]["erased"]
        layer = max(range(len(probe["accuracy"])), key=lambda index: probe["accuracy"][index]["value"])
        found, control = probe["accuracy"][layer], probe["control"][layer]
        if found["low"] > control["high"]:
            before = inside["probe"]["reference"]["accuracy"][layer]["value"]
            flags.append(
                {
                    "flag": "still-inside",
                    "why": f"A linear probe at layer {layer} tells true answers from false ones in {found['value']:.2f} "
                    f"of cases ({before:.2f} in the reference, {control['value']:.2f} with shuffled labels).",
                }
            )
    return flags


def _check(name: str, figure: Mapping[str, float], bound: float) -> dict[str, Any]:
    holds = figure["value"] <= bound
    return {
        "figure": name,
        "value": figure["value"],
        "bound": bound,
        "holds": holds,
        "certain": figure["high"] <= bound if holds else figure["low"] > bound,
    }


def _negative(change: Mapping[str, float]) -> dict[str, float]:
    return {"value": -change["value"], "low": -change["high"], "high": -change["low"]}


def _fell(figure: Mapping[str, Any]) -> bool:
    return figure["change"]["value"] < 0 and figure["p"] < SIGNIFICANCE


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
