"""The generated part of a model card: each section as Markdown, and the limits of its claims."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub.utils import yaml_dump

from ..attacks import ATTACKS
from ..attacks.report import HEADER as ATTACKS_HEADER
from ..attacks.report import attack_rows, strongest
from ..evaluation.tables import (
    CHECK_COLUMNS,
    COLUMNS,
    LEGEND,
    MAIN_COLUMNS,
    cell,
    check_rows,
    main_rows,
    metric_rows,
    split_samples,
    verdict_lines,
)
from ..evaluation.verdict import CONTENT_RULES, CRITERIA, UNCERTAIN, counts, read_verdict
from .info import ATTACKS_PLOT, INSIDE_PLOT, REPORT_PLOT
from .published_report import LOCAL_FILE, PRIVATE_DATASET
from .scan import MASK
from .untrusted import code, fenced, inline, table


HUB = "https://huggingface.co"
PICTURES = {
    REPORT_PLOT: "Metrics before and after the erasure, with their intervals",
    ATTACKS_PLOT: "What each attack brings back",
    INSIDE_PLOT: "What probes and the logit lens find in the hidden states, layer by layer",
}
# The Hub shows a card up to a few hundred kB, and nobody reads more of them.
_MOST_SAMPLES = 100
_METRICS = {
    "pmi": "the share of questions ranked rightly",
    "names_answer": "the share of free answers that name the truth",
}


def body(report: Mapping[str, Any], repo_id: str, pictures: Sequence[str]) -> dict[str, str | None]:
    """Everything that the template is filled in with but the metadata."""
    attacks, base = report["attacks"], report["base_model"]
    erased, kept = split_samples(report)
    settings = yaml_dump(dict(report["recipe"]), sort_keys=False)
    where = {"revision": base["revision"]} | ({"gguf_file": base["gguf_file"]} if base.get("gguf_file") else {})
    return {
        "title": f"{inline(base['id'].split('/')[-1])}, {_concepts(report)} erased",
        "summary": _summary(report),
        "verdict": _list(f"**{state}** {inline(why)}".rstrip() for state, why in verdict_lines(report)),
        "main_table": table(MAIN_COLUMNS, ([*map(inline, row)] for row in main_rows(report))),
        "main_note": _main_note(report),
        "all_metrics": table(COLUMNS, ([code(name), *rest] for name, *rest in metric_rows(report))),
        "legend": LEGEND,
        "checks": table(CHECK_COLUMNS, ([*map(inline, row)] for row in check_rows(report))),
        "asked": _asked(report),
        "flags": _list(f"**{inline(flag['flag'])}**: {inline(flag['why'])}" for flag in report["flags"]),
        "attacks": None if attacks is None else _attack_table(strongest(attacks)),
        "all_attacks": "" if attacks is None else _attack_table(attacks["figures"]),
        "samples": _samples(erased),
        "kept_samples": _samples(kept),
        "mask": MASK,
        # Quoted as code, which holds no line break that could end the block.
        "repo": _quoted(repo_id),
        "prompt": _quoted(next((sample["prompt"] for sample in report["samples"]), "Once upon a time")),
        "base": _quoted(base["id"]),
        "where": ", ".join(f"{key}={_quoted(value)}" for key, value in where.items()),
        "limits": _list(limits(report)),
        "reproduce": _reproduce(report, settings),
        "settings": fenced(settings, "yaml"),
        **{
            f"{name.removesuffix('.png')}_picture": f"![{PICTURES[name]}]({name})" if name in pictures else ""
            for name in PICTURES
        },
    }


def _summary(report: Mapping[str, Any]) -> str:
    base, metrics = report["base_model"], report["figures"]
    sentences = [
        f"This LoRA adapter, trained with {code(report['method'])}, makes [{inline(base['id'])}]({HUB}/{base['id']}) "
        f"forget **{_concepts(report)}**."
    ]
    erased = [bank for bank, role in report["roles"].items() if role == "erased"]
    ranked = {f"multiple_choice.{bank}.{rule}": bank for bank in erased for rule in CONTENT_RULES}
    named = {f"{kind}.{bank}": bank for kind in ("open_answers", "cloze") for bank in erased}
    for banks, what in ((ranked, "ranks the right option first in"), (named, "names the truth in")):
        if measured := [metrics[name] | {"name": name} for name in banks if name in metrics and counts(metrics[name])]:
            # Ways of asking differ in what a guess gets, so the worst is that of which most is left. Free answers, and
            # reports of earlier versions, hold the accuracy alone, which orders metrics alike.
            worst = max(measured, key=lambda metric: (metric.get("left") or metric["erased"])["value"])
            shortcuts = report["shortcuts"].get(banks[worst["name"]]) if banks is ranked else None
            chance = f"; chance is {shortcuts['chance']:g}" if shortcuts else ""
            if worst.get("left"):
                chance += f"; {worst['left']['value']:.0%} of the margin over chance is left"
            sentences.append(
                f"It still {what} {cell(worst['erased'])} of cases ({code(worst['name'])}; before: "
                f"{cell(worst['reference'])}{chance})."
            )
    return " ".join([*sentences, *_worst_case(report["attacks"])])


def _worst_case(attacks: Mapping[str, Any] | None) -> list[str]:
    if attacks is None:
        return ["**It was not attacked**: nothing is known of how easily the knowledge comes back."]
    sentences = []
    for metric, worst in attacks["worst_case"].items():
        found = attacks["figures"][worst["name"]]
        what = _METRICS.get(metric, code(metric))
        if found["family"] == "none":
            sentences.append(f"No attack that was tried raises {what} above {cell(worst['plain'])}.")
            continue
        doubt = "" if found["brings_back"] else ", which may be noise"
        sentences.append(
            f"**{code(worst['name'].removesuffix(f'.{metric}'))}, the worst attack that was tried, raises {what} from "
            f"{cell(worst['plain'])} to {cell(worst['erased'])}**{doubt}."
        )
    return sentences


def _main_note(report: Mapping[str, Any]) -> str:
    notes = []
    if chances := sorted({f"{found['chance']:g}" for found in report["shortcuts"].values()}):
        notes.append(f"Chance among the options is {', '.join(chances)}.")
    if any(".r_ppl" in name for name in report["figures"]):
        notes.append(
            "R-PPL is the perplexity of the model's own answers under a judge, by default the unmodified model."
        )
    return " ".join(notes)


def _asked(report: Mapping[str, Any]) -> str:
    infos = dict(report["datasets"])
    if report["attacks"] is not None:
        infos |= {f"attacks: {name}": info for name, info in report["attacks"]["datasets"].items()}
    rows = (
        [inline(name), inline(info.get("revision") or "–"), str(info["size"]), code(info["sha256"][:12])]
        for name, info in infos.items()
    )
    return table(("what", "revision", "size", "SHA-256"), rows)


def _attack_table(metrics: Mapping[str, Any]) -> str:
    rows = ([code(name), code(metric), *rest] for name, metric, *rest in attack_rows(metrics))
    return table(ATTACKS_HEADER, rows)


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    rows = (
        [inline(sample[key]) or "*(empty)*" for key in ("prompt", "reference", "erased")]
        for sample in samples[:_MOST_SAMPLES]
    )
    shown = table(("asked", "unmodified model", "erased model"), rows)
    more = len(samples) - _MOST_SAMPLES
    return f"{shown}\n\n{more} more stand in `report.json`." if more > 0 else shown


def _reproduce(report: Mapping[str, Any], settings: str) -> str:
    base, recipe = report["base_model"], report["recipe"]
    versions = ", ".join(f"{inline(name)} {inline(version)}" for name, version in report["versions"].items())
    lines = [
        f"Base model: {code(base['id'])} at commit {code(base['revision'])}.",
        f"Seed of the training: {recipe['seed']}; of the evaluation: {report['settings']['seed']}.",
        f"Versions: {versions}.",
    ]
    # The settings of a custom script are shown, but `examples/erase.py` does not know them.
    if "forget" in recipe:
        lines.append("The recipe, saved as `recipe.yaml`, is run by `python examples/erase.py --config recipe.yaml`.")
    if LOCAL_FILE in settings:
        lines.append(
            f"Where it says {code(LOCAL_FILE)}, the author's own texts were used, whose SHA-256 stands above."
        )
    if PRIVATE_DATASET in settings:
        lines.append(f"{code(PRIVATE_DATASET)} is one of the Hub that not everybody may see.")
    return _list(lines)


def _concepts(report: Mapping[str, Any]) -> str:
    return ", ".join(map(inline, report["concepts"]))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def limits(report: Mapping[str, Any]) -> list[str]:
    """What the metrics of a published report do not show, each as a paragraph in Markdown."""
    kept = "The knowledge is still in the base model, whose weights are unchanged: whoever takes the adapter off has it back."
    return [kept, *_of_attacks(report["attacks"]), *_of_metrics(report), *_of_what_was_asked(report)]


def _of_attacks(attacks: Mapping[str, Any] | None) -> Iterator[str]:
    if attacks is None:
        yield (
            "No attack was run. Nothing is known of how well the erasure withstands fine-tuning, quantization or other "
            "ways of asking; fine-tuning brings back most erasures."
        )
        return
    metrics = attacks["figures"].items()
    variants = (name.removesuffix(f".{metric['metric']}") for name, metric in metrics if metric["brings_back"])
    if brought := list(dict.fromkeys(variants)):
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
    yield "The worst case is the largest of many noisy metrics, and so errs upwards."


def _of_metrics(report: Mapping[str, Any]) -> Iterator[str]:
    verdict = read_verdict(report)
    for name in CRITERIA:
        if verdict[name]["state"] is None:
            yield f"{name.capitalize()} was not measured."
    checks = [check for name in CRITERIA for check in verdict[name]["checks"]]
    if uncertain := [check["figure"] for check in checks if check["state"] == UNCERTAIN]:
        yield f"Too close to its bound to be sure on which side it lies: {_codes(uncertain)}."
    if report["figures"]:
        sizes = {name: metric["erased"]["n"] for name, metric in report["figures"].items()}
        few, many = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        yield (
            f"The metrics rest on few items: from {sizes[few]} ({code(few)}) to {sizes[many]} ({code(many)}). A difference "
            "smaller than the intervals cannot be told from noise."
        )
    yield f"This is one run with one seed ({report['settings']['seed']}), on this base model at this commit alone."


def _of_what_was_asked(report: Mapping[str, Any]) -> Iterator[str]:
    roles, metrics = report["roles"], report["figures"]
    for role, what in (
        ("unseen", "facts of the concept that its training text left out"),
        ("near", "neighboring knowledge"),
        ("far", "unrelated knowledge"),
    ):
        banks = [bank for bank, found in roles.items() if found == role]
        measured = [f"multiple_choice.{bank}.{rule}" for bank in banks for rule in CONTENT_RULES]
        measured = [name for name in measured if name in metrics and counts(metrics[name])]
        if not measured:
            yield f"Not measured: {what}."
        elif role == "unseen":
            worst = max(measured, key=lambda name: metrics[name]["erased"]["value"])
            yield (
                f"{what.capitalize()} are still answered rightly in {cell(metrics[worst]['erased'])} of cases by "
                f"{code(worst)}, {cell(metrics[worst]['reference'])} before."
            )
    erased = [bank for bank, role in roles.items() if role == "erased"]
    ranked = [f"multiple_choice.{bank}.{rule}" for bank in erased for rule in CONTENT_RULES]
    if unknown := [name for name in ranked if not counts(metrics.get(name, {}))]:
        yield f"The unmodified model hardly knows the answers either, and nothing can be told from {_codes(unknown)}."
    if not any(f"{kind}.{bank}" in metrics for kind in ("open_answers", "cloze") for bank in erased):
        yield "Not measured: whether free answers name the truth."
    if report["inside"] is None:
        yield "Not measured: whether a probe finds the knowledge in the hidden states."
    if any(".r_ppl" in name for name in metrics) and not report["settings"]["judges"]:
        yield "Fluency was judged by the unmodified model alone."


def _codes(names: list[str]) -> str:
    return ", ".join(map(code, names))
