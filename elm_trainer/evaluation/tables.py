"""A report as a table for the terminal, as Markdown, and as samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from .verdict import RANKING_RULES


COLUMNS = ("figure", "n", "reference", "erased", "change", "p")
LEFT_COLUMNS = ("asked", "role", "rule", "n", "chance", "reference", "erased", "margin left")


def render_table(report: Mapping[str, Any]) -> Table:
    """The figures of an evaluation as a table for the terminal."""
    table = Table(*COLUMNS, title="Before and after (95 % intervals)")
    table.columns[0].overflow = "fold"
    for row in figure_rows(report):
        table.add_row(*row)
    return table


def render_verdict(report: Mapping[str, Any]) -> Table:
    """The three criteria, what speaks against each, and the flags, as a table for the terminal."""
    table = Table("criterion", "verdict", "what speaks against it", title="Verdict")
    for name, verdict, why in verdict_rows(report):
        table.add_row(name, verdict, why)
    for flag in report["flags"]:
        table.add_row("flag", flag["flag"], flag["why"])
    return table


def write_markdown(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write an evaluation as Markdown: verdict, flags, and every figure with its interval."""
    lines = ["# Evaluation of an erasure\n", "| criterion | verdict | what speaks against it |", "| --- | --- | --- |"]
    lines += [f"| {name} | {verdict} | {why} |" for name, verdict, why in verdict_rows(report)]
    lines += ["", *(f"**{flag['flag']}**: {flag['why']}\n" for flag in report["flags"])]
    lines += [
        *_left_lines(report),
        "Changes are differences, for perplexities ratios, paired item by item; p is McNemar's exact test or the "
        "paired bootstrap, corrected by Holm's method over all figures.\n",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
        *(f"| {' | '.join(row)} |" for row in figure_rows(report)),
        "\n| what was asked | revision | size | SHA-256 |\n| --- | --- | --- | --- |",
    ]
    for name, info in report["datasets"].items():
        lines.append(f"| {name} | {info.get('revision') or '–'} | {info['size']} | `{info['sha256'][:12]}` |")
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def left_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What is left in each way of asking for the concept, as text in the order of `LEFT_COLUMNS`."""
    rows = []
    for name, figure in report["figures"].items():
        kind, _, rest = name.partition(".")
        bank, _, rule = rest.partition(".")
        role = bank if kind == "families" else report["roles"].get(bank)
        if "left" in figure and role in ("erased", "unseen") and rule in RANKING_RULES:
            left = "reference too near chance" if figure["left"] is None else cell(figure["left"])
            sides = (cell(figure[side]) for side in ("reference", "erased"))
            asked = "all that count" if kind == "families" else bank
            rows.append((asked, role, rule, str(figure["erased"]["n"]), f"{figure['chance']:.2f}", *sides, left))
    return rows


def _left_lines(report: Mapping[str, Any]) -> list[str]:
    rows = left_rows(report)
    if not rows:
        return []
    return [
        "Ways of asking for the concept, and the share of the reference's margin over chance that is left:\n",
        f"| {' | '.join(LEFT_COLUMNS)} |",
        "| --- " * len(LEFT_COLUMNS) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def write_samples(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write the answers of both models to the same questions as Markdown."""
    lines = ["# Answers before and after\n"]
    for sample in report["samples"]:
        lines += [f"**{sample['prompt']}** (true answer: {sample['answer']})\n"]
        lines += [f"- {side}: {' '.join(sample[side].split()) or '(empty)'}" for side in ("reference", "erased")]
        lines.append("")
    Path(path).write_text("\n".join(lines), encoding="utf-8")


def figure_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Every figure of an evaluation as text, in the order of `COLUMNS`."""
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


def verdict_rows(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The name of each criterion, its verdict, and what speaks against it; of innocence also the worst way of asking."""
    rows = []
    for name in ("innocence", "seamlessness", "specificity"):
        found = report["verdict"][name]
        verdict = {True: "holds", False: "fails", None: "not measured"}[found["holds"]]
        failed = [
            f"{check['figure']} {check['value']:.3g} > {check['bound']:g}{'' if check['certain'] else ' (uncertain)'}"
            # A common interval may reach beyond a bound that the value keeps.
            if check["value"] > check["bound"]
            else f"{check['figure']} {check['value']:.3g}, but its interval reaches beyond {check['bound']:g}"
            for check in found["checks"]
            if not check["holds"]
        ]
        ignored = [check["figure"] for check in found["checks"] if not check.get("counted", True)]
        if banks := dict.fromkeys(_short(figure).rpartition(".")[0] for figure in ignored):
            failed.append(f"not counted, as the reference hardly knows the answers: {', '.join(banks)}")
        if worst := found.get("worst"):
            failed.insert(
                0, f"worst: {_short(worst['figure'])} {worst['value']:.3g}, {worst['share']:.0%} of the margin"
            )
        rows.append((name, verdict, "; ".join(failed) or "–"))
    return rows


def _short(figure: str) -> str:
    return figure.removeprefix("multiple_choice.")


def cell(figure: Mapping[str, float]) -> str:
    """A figure as `value [low, high]`, or as its value alone where nothing is uncertain about it."""
    # `z`: no minus sign before a zero.
    if figure["low"] == figure["value"] == figure["high"]:
        return f"{figure['value']:z.3f}"
    return f"{figure['value']:z.3f} [{figure['low']:z.3f}, {figure['high']:z.3f}]"
