"""One rule by which the settings of all methods are chosen, and by which all methods are ranked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..verdict import CRITERIA, judge, multiple


RULE = (
    "Every figure that the verdict holds to a bound is taken as a multiple of that bound (perplexities by their "
    "logarithms); of the concept, that is the share of the margin over chance that is left, in the worst way of asking "
    "that the reference can answer. A criterion's score is its largest multiple, and a setting's the largest of the "
    "three: at most 1 means that all bounds are kept. The lowest wins; of equals the one of the lowest mean over the criteria."
)


def score(figures: Mapping[str, Mapping[str, Any]], roles: Mapping[str, str]) -> dict[str, float]:
    """How far an erasure is from the bounds of [`Criteria`], by `RULE`.

    Args:
        figures (`Mapping`): Figures with `reference`, `erased` and `change`, and those of choices with `left`.
        roles (`Mapping`): Role of each bank.

    Returns:
        `dict[str, float]`: the score of each criterion, their `worst` and their `mean`.
    """
    verdict = judge(figures, roles)
    checks = {name: [c for c in verdict[name]["checks"] if c.get("counted", True)] for name in CRITERIA}
    scores = {name: max(map(multiple, checks[name]), default=math.nan) for name in CRITERIA}
    return scores | {"worst": max(scores.values()), "mean": sum(scores.values()) / len(scores)}


def choose(scores: Sequence[Mapping[str, float] | None]) -> int | None:
    """Index of the best setting; `None` stands for one that failed, and is returned where all did."""
    ended = [(found["worst"], found["mean"], index) for index, found in enumerate(scores) if found is not None]
    return min(ended)[2] if ended else None
