"""Whether a question bank can be answered without its questions."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.questions import Question, overlap_verdicts
from .measures import Items
from .statistics import bootstrap_mean


def find_shortcuts(banks: Mapping[str, Sequence[Question]], removed: Mapping[str, Items]) -> dict[str, dict[str, Any]]:
    """Hold two ways of guessing against chance.

    Args:
        banks (`Mapping[str, Sequence[Question]]`): Questions by name of the bank.
        removed (`Mapping[str, Items]`): Which of them the reference answers with the question removed.

    Returns:
        `dict`: for each bank in `removed`, `question_removed` and `letters` (picking the option that looks most like
        the question's subject), each a figure over different sets of options; `chance`; and `flagged`: whether the
        interval of one of them lies above chance.
    """
    found = {}
    for name, items in removed.items():
        questions = banks[name]
        # Phrasings of one fact share their options, and count once.
        facts = {(q.answer, frozenset(q.options)): index for index, q in enumerate(questions)}
        once = list(facts.values())
        kept = [questions[index] for index in once]
        chance = sum(1 / len(question.options) for question in kept) / len(kept)
        guesses = {
            "question_removed": bootstrap_mean([items.values[index] for index in once]).to_dict(),
            "letters": bootstrap_mean(overlap_verdicts(kept)).to_dict(),
        }
        flagged = any(guess["low"] > chance for guess in guesses.values())
        found[name] = {**guesses, "chance": chance, "flagged": flagged}
    return found
