"""A comparison as tables and as a plot."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from rich.table import Table

from ..attacks.report import HEADER, attack_rows
from ..evaluation.tables import cell, markdown_table, plot_file, terminal_table
from ..evaluation.verdict import CRITERIA, HOLDS
from .report import headlines


TITLES = {"updates": "A set number of updates", "seconds": "The same wall-clock time"}


def render_comparison(report: Mapping[str, Any]) -> list[Table]:
    """Both tables in short, the costs and the claims, for a terminal of 80 columns."""
    rendered = []
    parts = [(f"{_title(report, budget)} (intervals in the file)", short_rows(report, budget)) for budget in TITLES]
    claims = [[f"{claim} ({table})", verdict] for claim, table, verdict, *_ in claim_rows(report)[1:]]
    parts += [("Costs", cost_rows(report)), ("What the paper says", [["claim", "verdict"], *claims])]
    for title, (header, *rows) in parts:
        table = terminal_table(title, *header)
        for row in rows:
            table.add_row(*row)
        rendered.append(table)
    return rendered


def short_rows(report: Mapping[str, Any], budget: str) -> list[list[str]]:
    """One of the two tables with the values of few metrics as text, header first."""
    names = {name: headline.short for name, headline in headlines(report["concept"]).items() if headline.short}

    def cells(row: Mapping[str, Any], side: str) -> list[str]:
        score = "–" if side == "reference" else f"{row['score']['worst']:.2f}"
        return [*(f"{row['figures'][name][side]['value']:.3g}" for name in names), score]

    return _by_method(report, budget, ["method", *names.values(), "× bound"], cells, lambda failed: "failed")


def markdown_comparison(report: Mapping[str, Any]) -> str:
    """The whole report in Markdown; its first paragraph says where a rival beats ELM."""
    config = report["recipe"]
    lines = ["# Comparison of erasure methods", "", first_paragraph(report), ""]
    lines += [
        f"Erased: {report['concept']}, from {config['model']}. Figures are means over the seeds "
        f"{', '.join(map(str, config['seeds']))}, with 95 % intervals of a bootstrap over seeds and items; the reference "
        "was measured once, on the same items. Every method trains a LoRA adapter on the same rows, at a rate that is "
        "constant after the warm-up; × worst bound is its score. Its settings were chosen among as many as the others', each trained "
        f"for the updates of the first table, on questions of the dev split. {report['rule']}",
        "",
    ]
    for budget in TITLES:
        lines += [f"## {_title(report, budget)}", "", *_table(table_rows(report, budget)), ""]
        if notes := _notes(report, budget):
            lines += [*(f"- {note}" for note in notes), ""]
    if report["beaten"]:
        paired = (
            "Differences are paired by seed and item; their intervals are not corrected for the number of figures."
        )
        lines += ["## Where a rival beats ELM", "", paired, "", *_table(beaten_rows(report)), ""]
    lines += ["## What the paper says", "", *_table(claim_rows(report)), ""]
    lines += ["## Costs", "", *_table(cost_rows(report)), "", _memory_line(report), ""]
    lines += ["## Settings and search", "", *_table(search_rows(report)), ""]
    if report["attacks"]:
        lines += ["## Attacks", "", "On models of the first seed and table.", "", *_table(worst_rows(report)), ""]
        for method, attacks in report["attacks"].items():
            lines += [
                f"### {_label(report, method)}",
                "",
                *markdown_table(HEADER, attack_rows(attacks["figures"])),
                "",
            ]
            lines += [f"- Skipped {entry['name']}: {entry['reason']}." for entry in attacks["skipped"]] + [""]
    lines += ["## What they answer", "", "Greedy answers of the first seed's model of the first table.", ""]
    for sample in report["samples"]:
        lines += [f"**{sample['prompt']}**", "", f"- reference: {_line(sample['reference'])}"]
        lines += [f"- {_label(report, method)}: {_line(text)}" for method, text in sample["methods"].items()] + [""]
    return "\n".join(lines)


def first_paragraph(report: Mapping[str, Any]) -> str:
    """Where a rival beats ELM, in words."""
    sentences, titles = [], headlines(report["concept"])
    for budget, title in TITLES.items():
        rows = report["tables"][budget]["methods"]
        scores = {method: row["score"]["worst"] for method, row in rows.items() if row["score"] is not None}
        if report["tables"][budget]["budget"] is None or "elm" not in scores:
            continue
        ahead = [
            f"{_label(report, method)} ({scores[method]:.2f})"
            for method in sorted(scores, key=lambda method: scores[method])
            if scores[method] < scores["elm"]
        ]
        nearer = f"{_list(ahead)} {'comes' if len(ahead) == 1 else 'come'}" if ahead else "no rival comes"
        sentences.append(
            f"With {title.lower()}, {nearer} nearer to keeping all bounds at once than ELM "
            f"({scores['elm']:.2f} times its worst bound)."
        )
        beaten = [(entry["method"], entry["figure"]) for entry in report["beaten"] if entry["budget"] == budget]
        figures = {method: [titles[name].title for other, name in beaten if other == method] for method in rows}
        better = [f"{_label(report, method)} on {_list(names)}" for method, names in figures.items() if names]
        if better:
            sentences.append(f"Beyond the 95 % interval, ELM is beaten by {'; by '.join(better)}.")
        else:
            sentences.append("On no single figure is it beaten beyond the 95 % interval.")
    if report["beaten"]:
        sentences.append(
            "A method that changes little keeps fluency and other knowledge for nothing: read these beside innocence."
        )
    return " ".join(sentences) or "ELM was not measured, so no rival is compared with it."


def table_rows(report: Mapping[str, Any], budget: str) -> list[list[str]]:
    """One of the two tables as text, header first; every method has a row, whatever became of it."""
    methods = report["tables"][budget]["methods"]
    counts = {name: found["erased"]["n"] for row in methods.values() for name, found in row["figures"].items()}
    # There is no metric of all ways of asking where the reference knows the answers in none of them.
    names = {
        name: headline.title + (f" (n {counts[name]})" if name in counts else "")
        for name, headline in headlines(report["concept"]).items()
        if name in counts or not name.startswith("families.")
    }
    header = ["method", "updates", "seconds", *names.values(), "× worst bound", *CRITERIA]

    def cells(row: Mapping[str, Any], side: str) -> list[str]:
        metrics = [row["figures"][name][side] for name in names]
        if side == "reference":
            return ["0", "0", *(f"{metric['value']:z.3f}" for metric in metrics), *["–"] * (1 + len(CRITERIA))]
        states = (row["verdict"][name]["state"] or "–" for name in CRITERIA)
        spans = (_span(row["updates"]), _span(row["seconds"]))
        return [*spans, *map(cell, metrics), f"{row['score']['worst']:.2f}", *states]

    return _by_method(report, budget, header, cells, lambda failed: f"failed: {', '.join(map(_seed, failed))}")


def _by_method(
    report: Mapping[str, Any],
    budget: str,
    header: list[str],
    cells: Callable[[Mapping[str, Any], str], list[str]],
    failed: Callable[[Mapping[str, str]], str],
) -> list[list[str]]:
    """The header, and rows of the reference and of each method, whatever became of it, from its `cells` by side."""
    rows, reference = [], []
    for method, row in report["tables"][budget]["methods"].items():
        label = _label(report, method) + (f" ({failed(row['failed'])})" if row["failed"] else "")
        if row["figures"]:
            # The same of every method.
            reference = [["reference", *cells(row, "reference")]]
            rows.append([label, *cells(row, "erased")])
        else:
            rows.append([label, *["–"] * (len(header) - 1)])
    return [header, *reference, *rows]


def claim_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The claims as text, header first."""
    rows = [["claim", "table", "verdict", "figures", "rule"]]
    for claim in report["claims"]:
        verdict = {True: "held", False: "did not hold", None: "not measured"}[claim["held"]]
        if claim["certain"] is False:
            verdict += " (uncertain)"
        metrics = [
            f"{part['what']} {cell(part)} ({'>' if part['above'] else '≤'} {part['bound']:.3g})"
            if "value" in part
            else f"{_label(report, part['what'])}: "
            + (_list([f"{name} {part[name]}" for name in CRITERIA if part[name] != HOLDS]) or "all three hold")
            for part in claim["evidence"]
        ]
        rows.append([claim["claim"], claim["budget"], verdict, "; ".join(metrics) or "–", claim["rule"]])
    return rows


def beaten_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Where a rival is better than ELM, as text, header first."""
    rows = [["table", "rival", "figure", "rival's", "ELM's", "difference"]]
    for entry in report["beaten"]:
        times = "×" if entry["statistic"] == "perplexity" else ""
        about = [entry["budget"], _label(report, entry["method"]), headlines(report["concept"])[entry["figure"]].title]
        rows.append([*about, cell(entry["rival"]), cell(entry["elm"]), f"{times}{cell(entry['difference'])}"])
    return rows


def cost_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """What the methods cost, as text, header first."""
    header = ["method", "set-up, s", "s a sample", "peak memory, GB", "whole comparison, s"]
    numbers = (
        ("setup_seconds", 1, ".1f"), ("seconds_per_sample", 1, ".3f"), ("peak_memory_bytes", 1e9, ".2f"),
        ("total_seconds", 1, ".0f"),
    )  # fmt: skip
    return [header] + [
        [
            entry["label"],
            *("–" if entry[key] is None else format(entry[key] / unit, form) for key, unit, form in numbers),
        ]
        for entry in report["methods"].values()
    ]


def search_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Every setting that was tried, its score on the dev split, and which was chosen, as text, header first."""
    rows = [["method", "adapter", "setting", "× worst bound (dev)", *CRITERIA, "chosen"]]
    for entry in report["methods"].values():
        for index, tried in enumerate(entry["search"]):
            setting = ", ".join(f"{key} {value}" for key, value in tried["settings"].items())
            worst, *scores = (
                "–" if tried["score"] is None else f"{tried['score'][name]:.2f}" for name in ("worst", *CRITERIA)
            )
            if "failed" in tried:
                worst = f"failed: {tried['failed']}"
            chosen = "yes" if index == entry["chosen"] else "no"
            rows.append([entry["label"], _adapter(entry["adapter"]), setting, worst, *scores, chosen])
    return rows


def worst_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """What the worst attack brings back from each method, as text, header first."""
    rows = [["method", "metric", "unattacked", "worst case", "attack"]]
    for method in report["methods"]:
        if method not in report["attacks"]:
            rows.append([_label(report, method), "–", "–", "not attacked", "–"])
            continue
        for metric, worst in report["attacks"][method]["worst_case"].items():
            cells = [cell(worst["plain"]), cell(worst["erased"])]
            rows.append([_label(report, method), metric, *cells, worst["name"].removesuffix(f".{metric}")])
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return markdown_table(rows[0], rows[1:])


def _notes(report: Mapping[str, Any], budget: str) -> list[str]:
    """What a reader must know of the rows of a table."""
    table, recipe = report["tables"][budget], report["recipe"]
    shared = {key: recipe[f"lora_{key}"] for key in ("rank", "layers", "targets")}
    notes = []
    for method, row in table["methods"].items():
        label = _label(report, method)
        notes += [f"{label} failed, {_seed(key)}: {why}" for key, why in row["failed"].items()]
        adapter = report["methods"][method]["adapter"]
        if adapter != shared:
            notes.append(f"{label} trains an adapter of its own shape: {_adapter(adapter)}.")
        if budget == "seconds" and row["updates"] and min(row["updates"]) == 0:
            notes.append(
                f"{label}: no update ended within the {table['budget']:.0f} s for "
                f"{row['updates'].count(0)} of {len(row['updates'])} seeds (its set-up alone takes "
                f"{report['methods'][method]['setup_seconds']:.0f} s), which count as the reference."
            )
    return notes


def _title(report: Mapping[str, Any], budget: str) -> str:
    amount = report["tables"][budget]["budget"]
    if budget == "updates":
        own = [(name, found.get("updates")) for name, found in report["recipe"].get("methods", {}).items()]
        return f"{TITLES[budget]}: {amount}" + "".join(f", {_label(report, name)} {n}" for name, n in own if n)
    clock = _label(report, report["recipe"]["clock"])
    if amount is None:
        return f"{TITLES[budget]}: not measured, since {clock}, whose time it is, failed"
    return f"{TITLES[budget]}: {amount:.0f} s ({clock}'s, set-up included)"


def _memory_line(report: Mapping[str, Any]) -> str:
    peaks = {method: report["methods"].get(method, {}).get("peak_memory_bytes") for method in ("rmu", "elm")}
    if None in peaks.values():
        return "Memory of RMU against ELM: not measured."
    return (
        f"RMU takes {peaks['rmu'] / peaks['elm']:.2f} times the memory of ELM (peak of the process at the end of its first "
        "training, model and libraries included)."
    )


def _label(report: Mapping[str, Any], method: str) -> str:
    return report["methods"][method]["label"]


def _adapter(shape: Mapping[str, Any]) -> str:
    layers = f"layers {shape['layers']}" if shape["layers"] else "all layers"
    return f"LoRA, rank {shape['rank']}, {layers}, {shape['targets']}"


def _seed(key: str) -> str:
    return key if key == "search" else f"seed {key}"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low}–{high}"


def _list(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "(empty)"


def plot_comparison(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw a comparison into a PNG file: a row for each budget, all axes relative to the reference (the cross).

    Up: the change of PMI accuracy on the concept. Across: the change on neighboring (circle) and unrelated (square)
    knowledge, and R-PPL and perplexity on retain text (diamond) as multiples. Lines are 95 % intervals. Down and towards
    the cross's column is better.
    """
    with plot_file(path, 12, 10) as figure:
        panels = figure.subplots(2, 2, sharey=True)
        up = f"multiple_choice.{report['concept']}.pmi"
        for (kept, fluent), (budget, title) in zip(panels, TITLES.items(), strict=True):
            for index, row in enumerate(report["tables"][budget]["methods"].values()):
                if not row["figures"]:
                    continue
                changes = {name: found["change"] for name, found in row["figures"].items()}
                color = f"C{index}"
                for name, marker in (("specificity.near", "o"), ("specificity.far", "s")):
                    if name in changes:
                        _mark(kept, changes[name], changes[up], marker, color)
                _mark(fluent, changes["fluency.greedy.r_ppl"], changes[up], "o", color)
                _mark(fluent, changes["retention.perplexity"], changes[up], "D", color)
            for axes, start in ((kept, 0), (fluent, 1)):
                axes.plot(start, 0, "+", color="black", markersize=14)
                axes.axhline(0, color="grey", linewidth=0.6)
                axes.axvline(start, color="grey", linewidth=0.6)
                axes.set(ylabel="concept ranked rightly (PMI), change")
            kept.set(
                xlabel="change of accuracy: near (circle), far (square)",
                title=f"Innocence and specificity, {title.lower()}",
            )
            fluent.set(
                xlabel="multiple of the reference's: R-PPL (circle), retain perplexity (diamond)",
                title=f"Innocence and seamlessness, {title.lower()}",
                xscale="log",
            )
            # Doubles, and one between: the labels of the decades' parts would lie upon each other.
            low, high = fluent.get_xlim()
            fluent.xaxis.set_major_locator(LogLocator(10) if high > 40 * low else LogLocator(2, subs=(1, 1.5)))
            fluent.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            fluent.xaxis.set_minor_locator(NullLocator())
        marks = [
            Line2D([], [], color=f"C{index}", marker="o", linestyle="") for index in range(len(report["methods"]))
        ]
        # Beside the points names would lie upon each other.
        figure.legend(
            marks, [found["label"] for found in report["methods"].values()], loc="outside lower center", ncols=8
        )


def _mark(axes: Any, across: Mapping[str, float], up: Mapping[str, float], marker: str, color: str) -> None:
    axes.plot([across["low"], across["high"]], [up["value"]] * 2, color=color, alpha=0.4)
    axes.plot([across["value"]] * 2, [up["low"], up["high"]], color=color, alpha=0.4)
    axes.plot(across["value"], up["value"], marker, color=color)
