"""What a figure is called where people read it: in the terminal, in `report.md`, on a card and in pictures."""

import re
from collections.abc import Mapping


ROLES = {
    "erased": "erased",
    "unseen": "erased, not in the forget text",
    "near": "neighbouring, to be kept",
    "far": "unrelated, to be kept",
}
_RULES = {
    "pmi": "right option ranked first, by PMI",
    "log_likelihood": "right option ranked first, by likelihood",
    "normalized": "right option ranked first, by likelihood per character",
    "letter": "letter of the right option chosen",
}
_WRITTEN = {"open_answers": "free answers", "cloze": "completed lines"}
_ANSWERS = {
    "": "that name the truth",
    "commonest": "with the same wrong name",
    "entropy": "entropy of what is named",
    "evenness": "evenness of what is named",
}
_FLUENCY = {
    "r_ppl": "R-PPL",
    "repetition": "repeated 3-grams",
    "distinct_2": "distinct pairs of words",
    "empty": "empty",
    "truncated": "cut off",
    "other_language": "in another language",
    "undecided_language": "too short to tell the language",
}
_RETENTION = {"perplexity": "perplexity", "kl": "KL divergence a token"}


def figure_label(name: str, roles: Mapping[str, str]) -> tuple[str, str]:
    """What a figure is about, and how it was measured; its name and nothing where it is none of this version.

    Args:
        name (`str`): Name of the figure in the report, such as `"multiple_choice.capitals.pmi"`.
        roles (`Mapping`): Role of each bank.
    """
    kind, bank, rule = split_name(name)
    about = f"{bank} ({ROLES[roles[bank]]})" if roles.get(bank) in ROLES else bank
    if kind == "multiple_choice" and rule in _RULES:
        return about, _RULES[rule]
    if kind == "families" and bank in ROLES and rule in _RULES:
        return f"all ways of asking that count ({ROLES[bank]})", _RULES[rule]
    if kind in _WRITTEN and rule in _ANSWERS:
        return about, f"{_WRITTEN[kind]} {_ANSWERS[rule]}"
    metric, _, judge = rule.partition(".")
    if kind == "fluency" and metric in _FLUENCY:
        return "answers about the concept", f"{_FLUENCY[metric]}, {bank}" + (f", judged by {judge}" if judge else "")
    if kind == "retention" and bank in _RETENTION:
        return "unrelated text", _RETENTION[bank]
    return name, ""


def attack_label(name: str, metric: str) -> str:
    """An attack and its variant in words: `"relearning.forget.lora.0.001.pmi"` is `"relearning, forget, lora, 0.001"`."""
    # A dot between digits belongs to a number.
    return re.sub(r"\.(?!\d)|(?<!\d)\.", ", ", name.removesuffix(f".{metric}"))


def main_figures(names: Mapping[str, object], roles: Mapping[str, str]) -> list[str]:
    """Names of the figures that a reader looks at first: what was erased before the rest, all together before each."""
    places: dict[str, tuple[int, int]] = {}
    banks = ["", *roles]
    for name in names:
        kind, bank, rule = split_name(name)
        role = bank if kind == "families" else roles.get(bank)
        if kind == "multiple_choice":
            main = rule == "pmi" or (role == "erased" and rule in ("log_likelihood", "normalized"))
        elif kind in _WRITTEN:
            main = rule == "commonest" or (rule == "" and role in ("erased", "unseen"))
        else:
            main = kind == "families" or rule.partition(".")[0] == "r_ppl" or name == "retention.perplexity"
        if main:
            place = [*ROLES].index(role) if role in ROLES else len(ROLES)
            places[name] = (place, banks.index(bank) if bank in roles else 0)
    return sorted(places, key=places.__getitem__)


def short_figures(names: Mapping[str, object], roles: Mapping[str, str]) -> list[str]:
    """Those of the main figures that a terminal has room for: of many ways of asking, all of them together."""
    together = {bank for kind, bank, _ in map(split_name, names) if kind == "families"}
    return [
        name
        for name in main_figures(names, roles)
        for kind, bank, rule in [split_name(name)]
        if not (kind == "multiple_choice" and roles.get(bank) in together) and rule not in ("commonest", "normalized")
    ]


def split_name(name: str) -> tuple[str, str, str]:
    """Kind, bank and rule of a figure's name; of fluency, how answers were drawn stands in the bank's place."""
    kind, _, rest = name.partition(".")
    bank, _, rule = rest.partition(".")
    return kind, bank, rule
