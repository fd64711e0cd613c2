"""A figure of the report: the ratio of two sides in every round, and what it should be."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A ratio that was measured in several rounds.

    Args:
        meaning (`str`): What is divided by what.
        rounds (`Sequence[float]`): The ratio in each round.
        at_most (`float`, *optional*): What the median should not exceed.
        at_least (`float`, *optional*): What it should reach.
        bound (`bool`, *optional*, defaults to `False`): Whether the true ratio is only known to be at least this large.
        details (`dict`, *optional*): What the rounds measured, for the report.
    """

    meaning: str
    rounds: Sequence[float]
    at_most: float | None = None
    at_least: float | None = None
    bound: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The figure as it stands in the report."""
        value = statistics.median(self.rounds)
        met = (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)
        return {
            "meaning": self.meaning,
            "value": value,
            "spread": [min(self.rounds), max(self.rounds)],
            "rounds": list(self.rounds),
            "at_most": self.at_most,
            "at_least": self.at_least,
            "met": met,
            "bound": self.bound,
            **self.details,
        }


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Ratio of two sides in each round; a round's sides ran right after one another."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]
