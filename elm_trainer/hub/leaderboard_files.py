"""A leaderboard as Markdown, JSON or CSV."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ..files import write_text
from .leaderboard import Entry, Group, Skipped
from .markdown import code, inline, table


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
        rows = [[inline(cell) for cell in cells(entry)] for entry in group.entries]
        parts += [f"## {title(group)}", table(HEADER, rows)]
    if skipped:
        parts += ["## Skipped", "\n".join(f"- {code(entry.repo)}: {inline(entry.reason)}" for entry in skipped)]
    return "\n\n".join(parts) + "\n"


def _json(groups: Sequence[Group], skipped: Sequence[Skipped]) -> str:
    board = {
        "note": NOTE,
        "groups": [asdict(group) for group in groups],
        "skipped": [asdict(entry) for entry in skipped],
    }
    return json.dumps(board, indent=2, ensure_ascii=False) + "\n"


def _csv(groups: Sequence[Group], skipped: Sequence[Skipped]) -> str:
    """One line per entry with its group, and one per skipped repository with the reason."""
    file = io.StringIO()
    writer = csv.DictWriter(file, ["group", *(field.name for field in fields(Entry)), "skipped"])
    writer.writeheader()
    for group in groups:
        for entry in group.entries:
            writer.writerow(asdict(entry) | {"group": group.measured, "concepts": ", ".join(entry.concepts)})
    writer.writerows({"repo": left_out.repo, "skipped": left_out.reason} for left_out in skipped)
    return file.getvalue()
