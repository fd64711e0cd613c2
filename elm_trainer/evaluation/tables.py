"""A report in sentences, tables, samples and a picture; and what other reports' tables and pictures share."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from ..files import replacing, write_text
from .verdict import (
    CRITERIA,
    FAILS,
    HOLDS,
    RANKING_RULES,
    UNCERTAIN,
    counted,
    counts,
    read_verdict,
    role_of,
    split_name,
)


if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
_BENCHMARKS = {
    "probability": "probability of the answer, by length",
    "truth_ratio": "truth ratio",
    "log_truth_ratio": "logarithm of the truth ratio",
    "rouge_l_recall": "free answers, ROUGE-L recall",
    "rouge_l_f1": "free answers, ROUGE-L F1",
    "model_utility": "model utility",
    "forget_quality": "forget quality (p against a model without it)",
}
COLUMNS = ("figure", "n", "reference", "erased", "change", "p")
MAIN_COLUMNS = ("about", "measured by", "n", "before", "after", "change", "p")
CHECK_COLUMNS = ("criterion", "about", "measured by", "held to the bound", "value", "bound", "verdict")
LEFT_COLUMNS = ("asked", "role", "rule", "n", "chance", "reference", "erased", "margin left")
NOT_MEASURED = "not measured"
# A term of the loss on training rows; `train_loss` is the mean of the whole loss over the run.
_TERM = re.compile(r"(?!eval_|train_)\w+_loss")
_COLORS = {"reference": "C0", "erased": "C3"}
# Where accuracy is to be kept, more is better; of all else, less.
_TO_BE_KEPT = ("near", "far")
# How the words of a verdict are meant.
LEGEND = (
    "A check holds where its whole interval keeps the bound, fails where all of it lies beyond, and is uncertain otherwise. "
    "A criterion fails with any of its checks, and holds where all do; of ways of asking that hold together, each need "
    "keep its bound by value alone."
)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def terminal_table(title: str, *columns: Column | str) -> Table:
    """An empty table for the terminal, narrow enough for 80 columns."""
    return Table(*columns, title=title, box=box.SIMPLE_HEAD, pad_edge=False)


def cell(figure: Mapping[str, float], digits: int = 3) -> str:
    """A metric as `value [low, high]`, or as its value alone where it has no interval or one without width."""
    # `z`: no minus sign before a zero. A check of a report of an earlier version may have no interval.
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    if low is None or low == value == high:
        return f"{value:z.{digits}f}"
    return f"{value:z.{digits}f} [{low:z.{digits}f}, {high:z.{digits}f}]"


def metric_label(name: str, roles: Mapping[str, str]) -> tuple[str, str]:
    """What a metric such as `"multiple_choice.capitals.pmi"` is about, and how it was measured; its name and nothing if it is unknown."""
    kind, bank, rule = split_name(name)
    about = f"{bank} ({ROLES[roles[bank]]})" if roles.get(bank) in ROLES else bank
    if kind == "multiple_choice" and rule in _RULES:
        return about, _RULES[rule]
    if kind == "families" and bank in ROLES and rule in _RULES:
        return f"all ways of asking that count ({ROLES[bank]})", _RULES[rule]
    if kind in _WRITTEN and rule in _ANSWERS:
        return about, f"{_WRITTEN[kind]} {_ANSWERS[rule]}"
    if kind == "benchmarks" and rule in _BENCHMARKS:
        return about, _BENCHMARKS[rule]
    if kind == "harness":
        return bank, f"lm-evaluation-harness, {rule}"
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


def main_metrics(names: Mapping[str, object], roles: Mapping[str, str]) -> list[str]:
    """Names of the metrics that a reader looks at first: what was erased before the rest, all together before each."""
    places: dict[str, tuple[int, int]] = {}
    banks = ["", *roles]
    for name in names:
        kind, bank, rule = split_name(name)
        role = role_of(name, roles)
        if kind == "multiple_choice":
            main = rule == "pmi" or (role == "erased" and rule in ("log_likelihood", "normalized"))
        elif kind in ("benchmarks", "harness"):
            main = rule != "log_truth_ratio"
        elif kind in _WRITTEN:
            main = rule == "commonest" or (rule == "" and role in ("erased", "unseen"))
        else:
            main = kind == "families" or rule.partition(".")[0] == "r_ppl" or name == "retention.perplexity"
        if main:
            place = [*ROLES].index(role) if role in ROLES else len(ROLES)
            places[name] = (place, banks.index(bank) if bank in roles else 0)
    return sorted(places, key=places.__getitem__)


def summary_metrics(names: Mapping[str, object], roles: Mapping[str, str]) -> list[str]:
    """Those of [`main_metrics`] that fit a terminal: of many ways of asking, all of them together are enough."""
    together = {bank for kind, bank, _ in map(split_name, names) if kind == "families"}
    kept = []
    for name in main_metrics(names, roles):
        kind, bank, rule = split_name(name)
        if rule not in ("commonest", "normalized") and not (kind == "multiple_choice" and roles.get(bank) in together):
            kept.append(name)
    return kept


def verdict_lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The verdict on each criterion, what fails first, and its worst check with value, interval and bound."""
    verdict = read_verdict(report)
    order = (FAILS, UNCERTAIN, None, HOLDS)
    lines = []
    for name in sorted(CRITERIA, key=lambda name: order.index(verdict[name]["state"])):
        state = verdict[name]["state"]
        if state is None:
            lines.append((f"{name.capitalize()} was {NOT_MEASURED}.", ""))
            continue
        worst, *others = counted(verdict[name])
        several = " of several" if state != HOLDS and any(check["state"] == state for check in others) else ""
        what = ", ".join(filter(None, metric_label(worst["figure"], report["roles"])))
        why = f"Worst{several}: {what}: {_held(name, worst)} {cell(worst)}, bound {worst['bound']:g}."
        lines.append((f"{name.capitalize()} {'is uncertain' if state == UNCERTAIN else state}.", why))
    return lines


def check_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every check of the verdict as text, in the order of `CHECK_COLUMNS`."""
    verdict = read_verdict(report)
    rows: list[tuple[str, ...]] = []
    for name in CRITERIA:
        for check in verdict[name]["checks"]:
            about, measured = metric_label(check["figure"], report["roles"])
            state = check["state"] or "does not count: the unmodified model hardly knows the answers"
            value = "–" if check["value"] is None else cell(check)
            held = (_held(name, check), value, f"{check['bound']:g}")
            rows.append((name, about, measured or "–", *held, state))
    return rows


def main_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The metrics that a reader looks at first as text, in the order of `MAIN_COLUMNS`."""
    rows = {name: rest for name, *rest in metric_rows(report)}
    return [
        (*metric_label(name, report["roles"]), *rows[name])
        for name in main_metrics(report["figures"], report["roles"])
    ]


def render_summary(report: Mapping[str, Any]) -> Table:
    """Before and after in few metrics, as a table that fits a terminal of 80 columns."""
    columns = (Column("measured by", overflow="fold"), Column("before", no_wrap=True), Column("after", no_wrap=True))
    table = terminal_table("Before and after (95 % intervals)", *columns)
    about = None
    for name in summary_metrics(report["figures"], report["roles"]):
        heading, measured = metric_label(name, report["roles"])
        if heading != about:
            about = heading
            table.add_row(Text(heading, style="bold"))
        sides = (report["figures"][name][side] for side in ("reference", "erased"))
        cells = (cell(metric, digits=1 if metric["high"] >= 10 else 2) for metric in sides)
        table.add_row(Padding(Text(measured), (0, 0, 0, 2)), *cells)
    return table


def write_markdown(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write an evaluation as Markdown: verdict, flags, what the verdict rests on, and every metric with its interval."""
    lines = ["# Evaluation of an erasure\n"]
    lines += [f"- **{state}** {why}" for state, why in verdict_lines(report)]
    lines += [f"- **{flag['flag']}**: {flag['why']}" for flag in report["flags"]]
    lines += ["\nIn brackets stand 95 % bootstrap intervals."]
    # Reports of an earlier version name no generator.
    lines += [f"Free answers were written by {report['generator']}."] if "generator" in report else []
    lines += ["\n## Before and after\n"]
    lines += [*markdown_table(MAIN_COLUMNS, main_rows(report)), "\n## What the verdict rests on\n", f"{LEGEND}\n"]
    lines += markdown_table(CHECK_COLUMNS, check_rows(report))
    if left := left_rows(report):
        lines += ["\n## Ways of asking, and the share of the reference's margin over chance that is left\n"]
        lines += markdown_table(LEFT_COLUMNS, left)
    lines += [
        "\n## All figures\n",
        "Changes are differences, for perplexities ratios, paired item by item; p is McNemar's exact test or the "
        "paired bootstrap, corrected by Holm's method over all figures.\n",
        *markdown_table(COLUMNS, metric_rows(report)),
        "\n## What was asked\n",
    ]
    asked = []
    for name, info in report["datasets"].items():
        # Of a task of the harness also its version and examples.
        task = f"task version {info['version']}, {info['num_fewshot']} examples" if "version" in info else None
        revision = "; ".join(filter(None, (info.get("revision"), task))) or "–"
        asked.append((name, revision, str(info["size"]), f"`{info['sha256'][:12]}`"))
    lines += markdown_table(("what", "revision", "size", "SHA-256"), asked)
    write_text(path, "\n".join(lines) + "\n")


def left_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What is left in each way of asking for the concept, as text in the order of `LEFT_COLUMNS`."""
    rows = []
    for name, metric in report["figures"].items():
        kind, bank, rule = split_name(name)
        role = role_of(name, report["roles"])
        if "left" in metric and role in ("erased", "unseen") and rule in RANKING_RULES:
            left = "reference too near chance" if metric["left"] is None else cell(metric["left"])
            sides = (cell(metric[side]) for side in ("reference", "erased"))
            asked = "all that count" if kind == "families" else bank
            rows.append((asked, role, rule, str(metric["erased"]["n"]), f"{metric['chance']:.2f}", *sides, left))
    return rows


def write_samples(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write the answers of both models to the same questions as Markdown, first those about what was erased."""
    lines = ["# Answers before and after\n"]
    for heading, samples in zip(("About the concept", "What is to be kept"), split_samples(report), strict=True):
        if samples:
            lines.append(f"## {heading}\n")
        for sample in samples:
            lines += [f"**{sample['prompt']}** (true answer: {sample['answer']})\n"]
            lines += [f"- {side}: {' '.join(sample[side].split()) or '(empty)'}" for side in ("reference", "erased")]
            lines.append("")
    write_text(path, "\n".join(lines))


def split_samples(report: Mapping[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The samples about what was erased, all of them in reports of an earlier version, and those about what is kept."""
    samples = [(sample.get("role", "erased") == "erased", sample) for sample in report["samples"]]
    return [sample for erased, sample in samples if erased], [sample for erased, sample in samples if not erased]


def metric_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every metric of an evaluation as text, in the order of `COLUMNS`."""
    return [
        (
            name,
            str(figure["erased"]["n"]),
            *(cell(figure[side]) for side in ("reference", "erased")),
            f"{'×' if figure['statistic'] == 'perplexity' else ''}{cell(figure['change'])}",
            "–" if figure["p"] is None else f"{figure['p']:.2g}",
        )
        for name, figure in report["figures"].items()
    ]


def _held(criterion: str, check: Mapping[str, Any]) -> str:
    """What of a metric is held to the criterion's bound."""
    kind, _, rule = split_name(check["figure"])
    if "counted" in check and kind in ("multiple_choice", "families"):
        return "share of the margin over chance that is left"
    if rule.partition(".")[0] == "r_ppl" or check["figure"] == "retention.perplexity":
        return "multiple of the unmodified model's"
    return {"innocence": "share", "seamlessness": "rise", "specificity": "fall"}[criterion]


@contextmanager
def plot_file(path: str | Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure of so many inches to draw on, which is written into a PNG file once the block has ended."""
    from matplotlib.figure import Figure  # takes half a second to import

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100)


def plot_report(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw what each criterion is judged by, before and after, and the loss terms where known, into a PNG file.

    One panel for each criterion, one line for each metric: a dot for the reference, one for the erased model, their 95 %
    intervals, and chance as a tick. Perplexities stand as multiples of the reference's. Lines that the verdict does not
    count are gray. An arrow beside each label points to the better side.
    """
    lines = _lines(report)
    # Innocence has the left column; beside it the others, each as high as its lines need, a quarter of an inch each.
    rows = [max(len(lines["seamlessness"]), 3), max(len(lines["specificity"]), 3), 6]
    height = 2.4 + 0.25 * max(len(lines["innocence"]), sum(rows) + 6)
    with plot_file(path, 12, height) as figure:
        mosaic = [["innocence", name] for name in ("seamlessness", "specificity", "losses")]
        panels: dict[str, Any] = figure.subplot_mosaic(mosaic, height_ratios=[count + 2 for count in rows])
        verdict = read_verdict(report)
        for name in CRITERIA:
            _dots(panels[name], report, lines[name])
            panels[name].set_title(f"{name.capitalize()}: {verdict[name]['state'] or NOT_MEASURED}")
        panels["innocence"].set_xlabel("share of questions; an arrow points to the better side")
        if panels["innocence"].lines:
            panels["innocence"].legend(fontsize=8, loc="lower right")
        losses = panels["losses"]
        log = report.get("training_log", [])
        for term in dict.fromkeys(key for entry in log for key in entry if _TERM.fullmatch(key)):
            points = [(entry["step"], entry[term]) for entry in log if term in entry]
            losses.plot(*zip(*points, strict=True), label=term.removesuffix("_loss"))
        losses.set(title="Loss terms", xlabel="step", yscale="log")
        if losses.lines:
            losses.legend(fontsize=8)


def _lines(report: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """By criterion, the metrics that belong in its panel, and the label of each."""
    found: dict[str, dict[str, str]] = {name: {} for name in CRITERIA}
    for name, metric in report["figures"].items():
        kind, bank, rule = split_name(name)
        role = report["roles"].get(bank)
        _, measured = metric_label(name, report["roles"])
        if kind == "multiple_choice" and rule == "pmi":
            criterion = "specificity" if role in _TO_BE_KEPT else "innocence"
            label = f"{bank} ({role}), ranked by PMI"
        elif kind in ("open_answers", "cloze") and role in ("erased", "unseen") and rule in ("", "commonest"):
            criterion, label = "innocence", f"{bank}, {measured}"
        elif kind == "fluency" and metric["statistic"] in ("mean", "perplexity"):
            criterion, label = "seamlessness", measured
        elif name == "retention.perplexity":
            criterion, label = "specificity", "unrelated text, perplexity"
        else:
            continue
        multiple = ", × reference" if metric["statistic"] == "perplexity" else ""
        found[criterion][name] = f"{label}{multiple} {'→' if role in _TO_BE_KEPT else '←'}"
    return found


def _dots(axes: Any, report: Mapping[str, Any], lines: Mapping[str, str]) -> None:
    for row, name in enumerate(lines):
        figure = report["figures"][name]
        multiples = {"reference": dict.fromkeys(("value", "low", "high"), 1.0), "erased": figure["change"]}
        sides = multiples if figure["statistic"] == "perplexity" else figure
        for offset, (side, usual) in zip((0.14, -0.14), _COLORS.items(), strict=True):
            value, low, high = (sides[side][key] for key in ("value", "low", "high"))
            color = usual if counts(figure) else "lightgray"
            axes.plot([low, high], [row - offset] * 2, color=color, linewidth=1, alpha=0.6)
            axes.plot(value, row - offset, "o", color=color, markersize=4, label=side if row == 0 else None)
        if name.startswith("multiple_choice."):
            # Reports of an earlier version hold it among the shortcuts alone.
            chance = figure.get("chance", report["shortcuts"].get(split_name(name)[1], {}).get("chance"))
            if chance is not None:
                label = "chance" if row == 0 else None
                axes.plot([chance] * 2, [row - 0.4, row + 0.4], "k--", linewidth=1, label=label)
    axes.set_yticks(range(len(lines)), list(lines.values()), fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
