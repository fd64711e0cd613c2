"""A leaderboard as Markdown, JSON or CSV."""

import csv
import io
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..files import write_text
from .card_data import finite
from .leaderboard import Entry, Group, Skipped
from .untrusted import code, inline, table


HEADER = (
    "adapter", "base", "erased", "innocence ↓ (before)", "n", "R-PPL × ↓", "largest fall ↓", "perplexity × ↓",
    "worst attack, ranked ↓", "worst attack, named ↓", "attacks", "innocence", "seamlessness", "specificity",
)  # fmt: skip
NOTE = (
    "Figures are those that the cards state; nobody has checked them. Entries are ranked only among those that were "
    "asked the same and measured by the same figures. What attacks found compares only where the column *attacks* is "
    "the same."
)
FORMATS = (".md", ".json", ".csv")


def write_leaderboard(path: str | Path, groups: Sequence[Group], skipped: Sequence[Skipped]) -> None:
    """Write a leaderboard in the format that the ending of `path` names.

    Raises:
        ValueError: for another ending than `.md`, `.json` and `.csv`.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"The leaderboard's file is {str(path)!r}: let it end in one of {', '.join(FORMATS)}.")
    write = {".md": _markdown, ".json": _json, ".csv": _csv}[path.suffix]
    write_text(path, write(groups, skipped))


def cells(entry: Entry) -> list[str]:
    """An entry as text, in the order of `HEADER`."""
    innocence = "–" if entry.innocence is None else f"{entry.innocence:.3f}"
    return [
        entry.repo,
        entry.base,
        ", ".join(entry.concepts),
        innocence if entry.before is None else f"{innocence} ({entry.before:.3f})",
        "–" if entry.innocence_n is None else str(entry.innocence_n),
        *(
            "–" if value is None else f"{value:z.3f}"
            for value in (entry.r_ppl, entry.fall, entry.perplexity, entry.worst_pmi, entry.worst_names_answer)
        ),
        entry.attacked or "none",
        entry.innocent,
        entry.seamless,
        entry.specific,
    ]


def title(group: Group) -> str:
    """What a group has in common."""
    if len(group.entries) == 1:
        return f"Measured as {group.measured or 'unattacked'}: one entry, comparable with no other"
    return f"Measured as {group.measured or 'unattacked'}: {len(group.entries)} entries, comparable with one another"


def _markdown(groups: Sequence[Group], skipped: Sequence[Skipped]) -> str:
    parts = ["# Leaderboard of erasures", NOTE]
    for group in groups:
        # As code what strangers named: nowhere are links and mentions made of it.
        rows = [[*map(code, named), *map(inline, rest)] for named, rest in map(_apart, group.entries)]
        parts += [f"## {title(group)}", table(HEADER, rows)]
    if skipped:
        parts += ["## Skipped", "\n".join(f"- {code(entry.repo)}: {inline(entry.reason)}" for entry in skipped)]
    return "\n\n".join(parts) + "\n"


def _apart(entry: Entry) -> tuple[list[str], list[str]]:
    """The cells of an entry that hold names, and the others."""
    found = cells(entry)
    return [cell or "–" for cell in found[:3]], found[3:]


def _json(groups: Sequence[Group], skipped: Sequence[Skipped]) -> str:
    board = {
        "note": NOTE,
        "groups": [
            {"measured": group.measured, "entries": [_finite(asdict(entry)) for entry in group.entries]}
            for group in groups
        ],
        "skipped": [asdict(entry) for entry in skipped],
    }
    return json.dumps(board, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity, which is written as in cards."""
    return {name: finite(value) if isinstance(value, float) else value for name, value in entry.items()}


def _csv(groups: Sequence[Group], skipped: Sequence[Skipped]) -> str:
    """One line per entry with its group, and one per skipped repository with the reason."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["group", *(field.name for field in fields(Entry)), "skipped"])
    writer.writeheader()
    for group in groups:
        for entry in group.entries:
            row = asdict(entry) | {"group": group.measured, "concepts": ", ".join(entry.concepts)}
            writer.writerow({name: _no_formula(value) for name, value in row.items()})
    for left_out in skipped:
        writer.writerow({"repo": _no_formula(left_out.repo), "skipped": _no_formula(left_out.reason)})
    return file.getvalue()


def _no_formula(value: Any) -> Any:
    """A text behind an apostrophe where a spreadsheet would compute it; numbers as they are."""
    if not isinstance(value, str):
        return value
    # Some take the full-width forms, and what follows blanks, for the same.
    start = unicodedata.normalize("NFKC", value).lstrip()[:1]
    return f"'{value}" if start in tuple("=+-@|%") or value[:1] in ("\t", "\r", "\n") else value
