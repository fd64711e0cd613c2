"""The limits of what a published report shows, in plain words."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..evaluation.attacks.ladder import ATTACKS
from ..evaluation.tables import cell
from ..evaluation.verdict import CONTENT_RULES, CRITERIA, UNCERTAIN, counts, read_verdict
from .markdown import code, inline


def limits(report: Mapping[str, Any]) -> list[str]:
    """What the figures of a published report do not show, each as a paragraph in Markdown."""
    return [*_of_the_adapter(), *_of_attacks(report["attacks"]), *_of_figures(report), *_of_what_was_asked(report)]


def variant(name: str, metric: str) -> str:
    """Name of an attack figure without its metric: the attack and its variant."""
    return name.removesuffix(f".{metric}")


def _of_the_adapter() -> Iterator[str]:
    yield (
        "The knowledge is still in the base model, whose weights are unchanged: whoever takes the adapter off has it "
        "back."
    )


def _of_attacks(attacks: Mapping[str, Any] | None) -> Iterator[str]:
    if attacks is None:
        yield (
            "No attack was run. Nothing is known of how well the erasure withstands fine-tuning, quantisation or other "
            "ways of asking; fine-tuning brings back most erasures."
        )
        return
    figures = attacks["figures"].items()
    brought = list(dict.fromkeys(variant(name, figure["metric"]) for name, figure in figures if figure["brings_back"]))
    if brought:
        yield f"It does not last: {_codes(brought)} brought knowledge back beyond noise."
        if half := [name for name in brought if name.startswith("relearning.half.")]:
            yield f"It was hidden rather than removed: {_codes(half)} brought back facts that its text did not show."
    else:
        yield "No attack that was run brought knowledge back beyond noise. Stronger attacks may."
    if missing := [name for name in ATTACKS if name not in attacks["families"]]:
        yield f"Not tried: {_codes(missing)}."
    for entry in attacks["skipped"]:
        yield f"Skipped: {code(entry['name'])}, as {inline(entry['reason'])}."
    relearning = [entry["settings"] for entry in attacks["attacks"] if entry["name"] == "relearning"]
    if relearning:
        steps = max(step for settings in relearning for step in settings["steps"])
        rate = max(settings["learning_rate"] for settings in relearning)
        yield (
            f"The longest relearning took {steps} steps, and the highest learning rate was {rate:g}. More of either may "
            "bring back more."
        )
    yield "The worst case is the largest of many noisy figures, so that it errs upwards."


def _of_figures(report: Mapping[str, Any]) -> Iterator[str]:
    verdict = read_verdict(report)
    for name in CRITERIA:
        if verdict[name]["state"] is None:
            yield f"{name.capitalize()} was not measured."
    checks = [check for name in CRITERIA for check in verdict[name]["checks"]]
    if uncertain := [check["figure"] for check in checks if check["state"] == UNCERTAIN]:
        yield f"Too close to its bound to be sure on which side it lies: {_codes(uncertain)}."
    if report["figures"]:
        sizes = {name: figure["erased"]["n"] for name, figure in report["figures"].items()}
        few, many = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        yield (
            f"The figures rest on few items: from {sizes[few]} ({code(few)}) to {sizes[many]} ({code(many)}). A difference "
            "smaller than the intervals cannot be told from noise."
        )
    yield f"This is one run with one seed ({report['settings']['seed']}), on this base model at this commit alone."


def _of_what_was_asked(report: Mapping[str, Any]) -> Iterator[str]:
    roles, figures = report["roles"], report["figures"]
    for role, what in (
        ("unseen", "facts of the concept that its training text left out"),
        ("near", "neighbouring knowledge"),
        ("far", "unrelated knowledge"),
    ):
        banks = [bank for bank, found in roles.items() if found == role]
        measured = [f"multiple_choice.{bank}.{rule}" for bank in banks for rule in CONTENT_RULES]
        measured = [name for name in measured if name in figures and counts(figures[name])]
        if not measured:
            yield f"Not measured: {what}."
        elif role == "unseen":
            worst = max(measured, key=lambda name: figures[name]["erased"]["value"])
            yield (
                f"{what.capitalize()} are still answered rightly in {cell(figures[worst]['erased'])} of cases by "
                f"{code(worst)}, {cell(figures[worst]['reference'])} before."
            )
    erased = [bank for bank, role in roles.items() if role == "erased"]
    if unknown := [
        f"multiple_choice.{bank}.{rule}"
        for bank in erased
        for rule in CONTENT_RULES
        if not counts(figures.get(f"multiple_choice.{bank}.{rule}", {}))
    ]:
        yield f"The unmodified model hardly knows the answers either, so that nothing can be told from {_codes(unknown)}."
    if not any(f"{kind}.{bank}" in figures for kind in ("open_answers", "cloze") for bank in erased):
        yield "Not measured: whether free answers name the truth."
    if report["inside"] is None:
        yield "Not measured: whether a probe finds the knowledge in the hidden states."
    if any(".r_ppl" in name for name in figures) and not report["settings"]["judges"]:
        yield "Fluency was judged by the unmodified model alone."


def _codes(names: list[str]) -> str:
    return ", ".join(map(code, names))
