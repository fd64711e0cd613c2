"""The claims of the ELM paper (arXiv 2410.02760) about the methods, each tested by a stated rule on metrics of several seeds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from ..evaluation.verdict import CRITERIA, FAILS, HOLDS, UNCERTAIN, Criteria
from .config import METHODS


# Rows of a table by method, each with `figures`, `verdict` and `failed`.
Rows: TypeAlias = Mapping[str, Mapping[str, Any]]
# R-PPL from which on text is called gibberish, as a multiple of the reference's: beyond what the verdict allows.
GIBBERISH = 1.5
# Largest fall of accuracy that counts as none: what may be lost of neighboring knowledge.
NO_FALL = Criteria().near


def paper_claims(rows: Rows, concept: str, budget: str) -> list[dict[str, Any]]:
    """The claims that can be told from one table.

    Args:
        rows: Rows of the table by method, each with `figures`, `verdict` and `failed`.
        budget: Which table it is.

    Returns:
        `list[dict]`: each with `budget`, `claim`, `rule`, `held` (`None` where a method it speaks of is not compared or
        failed), `certain` (the intervals say the same as the values), and `evidence`.
    """

    def r_ppl(method: str, above: bool = False) -> dict[str, Any]:
        change = rows[method]["figures"]["fluency.greedy.r_ppl"]["change"]
        return _held(f"{METHODS[method].label}, R-PPL", change, GIBBERISH, above)

    def fall(method: str, rule: str) -> dict[str, float]:
        change = rows[method]["figures"][f"multiple_choice.{concept}.{rule}"]["change"]
        return {"value": -change["value"], "low": -change["high"], "high": -change["low"]}

    def small_fall(method: str, rule: str, bound: float) -> dict[str, Any]:
        return _held(f"{METHODS[method].label}, fall by {rule}", fall(method, rule), bound)

    claims = (
        _claim(
            rows,
            ("rmu", "elm"),
            "RMU's text about the concept turns to gibberish, ELM's stays fluent",
            f"R-PPL of greedy answers, as a multiple of the reference's: above {GIBBERISH:g} for RMU, at most that for ELM",
            lambda: [r_ppl("rmu", above=True), r_ppl("elm")],
        ),
        _claim(
            rows,
            ("whp",),
            "WHP answers multiple choice about the concept as before",
            f"its accuracy falls by at most {NO_FALL:g}, by PMI and by log-likelihood",
            lambda: [small_fall("whp", rule, NO_FALL) for rule in ("pmi", "log_likelihood")],
        ),
        _claim(
            rows,
            ("repnoise", "elm"),
            "RepNoise keeps fluency and forgets little",
            f"R-PPL at most {GIBBERISH:g} times the reference's, and a fall of PMI accuracy at most half of ELM's",
            lambda: [r_ppl("repnoise"), small_fall("repnoise", "pmi", fall("elm", "pmi")["value"] / 2)],
        ),
        _only_good(rows),
    )
    return [{"budget": budget} | claim for claim in claims]


def _claim(
    rows: Rows, methods: tuple[str, ...], text: str, rule: str, evidence: Callable[[], list[dict[str, Any]]]
) -> dict[str, Any]:
    """A claim about methods, in words, held to the metrics."""
    if not all(_measured(rows, method) for method in methods):
        return _entry(text, rule)
    parts = evidence()
    held = all(part["holds"] for part in parts)
    # One part that fails for certain settles it.
    failed = any(part["certain"] for part in parts if not part["holds"])
    return _entry(text, rule, held, all(part["certain"] for part in parts) if held else failed, parts)


def _entry(
    text: str, rule: str, held: bool | None = None, certain: bool | None = None, evidence: Sequence[Any] = ()
) -> dict[str, Any]:
    return {"claim": text, "rule": rule, "held": held, "certain": certain, "evidence": list(evidence)}


def _held(what: str, metric: Mapping[str, float], bound: float, above: bool = False) -> dict[str, Any]:
    """A metric that the claim wants above a bound, or at most there."""
    value, low, high = (metric[key] for key in ("value", "low", "high"))
    found: dict[str, Any] = {"what": what, "value": value, "low": low, "high": high, "bound": bound, "above": above}
    # It is certain where the whole interval is on the side of the value.
    return found | {
        "holds": (value > bound) is above,
        "certain": low > bound if value > bound else high <= bound,
    }


def _only_good(rows: Rows) -> dict[str, Any]:
    """The claim that ELM alone is good at all three criteria."""
    text = "ELM is the only one good at innocence, seamlessness and specificity"
    rule = "all three criteria hold for ELM, and for no other method"
    rivals = [method for method in rows if method != "elm" and _measured(rows, method)]
    if not _measured(rows, "elm") or not rivals:
        return _entry(text, rule)
    found = {
        method: {name: rows[method]["verdict"][name]["state"] for name in CRITERIA} for method in ("elm", *rivals)
    }
    # What the three criteria say together; what was not measured is uncertain.
    states = {
        method: FAILS if FAILS in by.values() else HOLDS if {*by.values()} == {HOLDS} else UNCERTAIN
        for method, by in found.items()
    }
    rival_holds = any(states[method] == HOLDS for method in rivals)
    held = states["elm"] == HOLDS and not rival_holds
    certain = all(states[method] == FAILS for method in rivals) if held else rival_holds or states["elm"] == FAILS
    evidence = [{"what": method, "state": states[method]} | by for method, by in found.items()]
    return _entry(text, rule, held, certain, evidence)


def _measured(rows: Rows, method: str) -> bool:
    """Whether a method is compared and none of its seeds failed."""
    return method in rows and bool(rows[method]["figures"]) and not rows[method]["failed"]
