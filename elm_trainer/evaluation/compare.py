"""Compare two erasures by their reports."""

from collections.abc import Mapping
from typing import Any

from .measures import Items, change, correct_p
from .report import check_report


def compare_reports(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How the erased model of the second report differs from that of the first, on the same items.

    Args:
        first (`Mapping`): An evaluation report.
        second (`Mapping`): Another one on the same reference and the same questions.

    Returns:
        `dict`: by name of the figure: `first`, `second`, `change` and `p` (corrected by Holm's method), as in
        [`evaluate_erasure`].

    Raises:
        TypeError: if one is no report, such as a path.
        ValueError: if one is a report of another kind or schema, the references differ, or what was asked differs in name, revision, size or content.
    """
    for name, report in (("first", first), ("second", second)):
        if not isinstance(report, Mapping):
            raise TypeError(
                f"`{name}` is of type {type(report).__name__}: give a report, such as `read_report(path)`."
            )
        check_report(report, name=f"`{name}`")
    if first["reference_sha256"] != second["reference_sha256"]:
        raise ValueError(
            f"The reports have different reference models (`reference_sha256` {first['reference_sha256'][:12]} and "
            f"{second['reference_sha256'][:12]}): compare erasures of the same model."
        )
    asked = [
        {
            name: info
            for name, info in report["datasets"].items()
            if name.split()[0] in ("bank", "open", "cloze", "texts")
        }
        for report in (first, second)
    ]
    if different := sorted(name for name in {*asked[0], *asked[1]} if asked[0].get(name) != asked[1].get(name)):
        name = different[0]
        raise ValueError(
            f"The reports ask different things ({', '.join(different)}): {name!r} is {asked[0].get(name)} in the first "
            f"and {asked[1].get(name)} in the second. Measure both with the same version and suite."
        )
    compared: dict[str, dict[str, Any]] = {}
    for name in first["figures"]:
        # Figures of all ways of asking together are made of the others' items.
        if name in second["figures"] and name in first["items"]:
            statistic = first["figures"][name]["statistic"]
            sides = [Items(statistic, **report["items"][name]["erased"]) for report in (first, second)]
            compared[name] = {"first": sides[0].figure().to_dict(), "second": sides[1].figure().to_dict()}
            compared[name] |= change(*sides)
    correct_p(compared)
    return compared
