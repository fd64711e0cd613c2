"""What an ideal erasure would show: the reference, asked about another country, in place of an erased model: `python -m benchmarks.novice`.

Whoever does not know a country's capital, and writes as before, names another one. So does the reference where the question names
another country of the same continent, whose name is then put back into its answer. Its ranking and its R-PPL, on the test split, are
what the demo's are to be held against; they are no bounds, since answers keep other traces of the other country, such as its people's
name. `--split dev` asks the dev questions.
"""

import argparse
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elm_trainer import load_model_and_tokenizer
from elm_trainer.data.facts import JUDGMENTS, facts_of
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.fluency import as_prompt, generate_answers
from elm_trainer.evaluation.likelihood import reverse_perplexity, score_choices
from elm_trainer.evaluation.suite import built_in_suite
from elm_trainer.modeling import DEMO_MODEL


DRAWS = 3


class StandIns:
    """Draws another country of the same continent, or another capital."""

    def __init__(self, seed: int):
        self._rng = random.Random(seed)
        self._facts = {fact.subject: fact for fact in facts_of("capitals")}
        # The longest first, so that no name is taken for one that it holds.
        self.subjects = sorted(self._facts, key=len, reverse=True)

    def named(self, text: str) -> str:
        """The country that a text names."""
        return next(subject for subject in self.subjects if subject in text)

    def other(self, subject: str, wanted: str = "subject") -> str:
        """The `subject` or the `answer` of another fact."""
        group = self._facts[subject].group
        others = [fact for fact in self._facts.values() if fact.group == group and fact.subject != subject]
        return getattr(self._rng.choice(others), wanted)

    def swapped(self, question: Question) -> Question | None:
        """The question about another country, or about another capital; nothing where it names neither in these words."""
        fact = self._facts[question.subject]
        wanted = next((name for name in ("subject", "answer") if question.cue == getattr(fact, name)), None)
        if wanted is None or set(question.options) == set(JUDGMENTS) or question.cue not in question.text:
            return None
        # What is asked about stands last, behind examples.
        before, _, after = question.text.rpartition(question.cue)
        return replace(question, text=before + self.other(question.subject, wanted) + after)


def renamed(text: str, old: str, new: str) -> str:
    """A text with another name in place of one, but not within a word."""
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, text)


def ranking(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bank: Sequence[Question]
) -> dict[str, tuple[float, float]] | None:
    """The share of right options that are ranked first, by PMI and by log-likelihood, of the `reference` and the ideal `novice`."""
    found = {}
    for side in ("reference", "novice"):
        asked = list(bank)
        if side == "novice":
            swapped = [StandIns(draw).swapped(question) for draw in range(DRAWS) for question in bank]
            if None in swapped:
                return None
            asked = [question for question in swapped if question is not None]
        scores = score_choices(model, tokenizer, asked)
        found[side] = mean(scores.pmi), mean(scores.log_likelihood)
    return found


class Swap(NamedTuple):
    """Prompts about other things, and what makes answers to them answers about the thing itself."""

    prompts: list[str]
    back: Callable[[list[str]], list[str]]


def countries_swapped(prompts: Sequence[str], draw: int) -> Swap:
    """Prompts about other countries."""
    draws = StandIns(draw)
    names = [draws.named(prompt) for prompt in prompts]
    others = [draws.other(name) for name in names]

    def back(answers: list[str]) -> list[str]:
        return [renamed(text, other, name) for text, name, other in zip(answers, names, others, strict=True)]

    return Swap([renamed(*parts) for parts in zip(prompts, names, others, strict=True)], back)


def print_fluency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    tokens: int,
    swap: Callable[[Sequence[str], int], Swap],
    console: Console,
) -> None:
    """Print R-PPL of the reference's answers, and for each draw how many times as high it is for the ideal novice's.

    Args:
        tokens: Length of an answer.
        swap: Makes the novice's prompts, by the number of the draw.
    """
    asked = [as_prompt(tokenizer, prompt) for prompt in prompts]

    def r_ppl(given: Sequence[str]) -> float:
        nlls, counts = reverse_perplexity(model, tokenizer, asked, given)
        return math.exp(sum(nlls) / sum(counts))

    answers = partial(generate_answers, model, tokenizer, max_new_tokens=tokens, seed=0)
    for how, temperature in (("greedy", 0.0), ("sampled", 0.7)):
        before, times = r_ppl(answers(asked, temperature=temperature).texts), []
        for draw in range(DRAWS):
            swapped = swap(prompts, draw)
            given = answers([as_prompt(tokenizer, prompt) for prompt in swapped.prompts], temperature=temperature)
            times.append(f"{r_ppl(swapped.back(given.texts)) / before:.2f}")
        console.print(f"R-PPL, {how}: {before:.2f}; ideal novice {', '.join(times)} times that")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--split", default="test", choices=["dev", "test"], help="questions that are asked")
    parser.add_argument("--questions", type=int, default=120, help="questions of a bank")
    arguments = parser.parse_args(argv)
    model, tokenizer = load_model_and_tokenizer(DEMO_MODEL)
    suite = built_in_suite(["capitals"], arguments.questions, split=arguments.split)
    table = Table("", "n", "reference", "ideal novice", title="Ranked first, by PMI / by log-likelihood")
    for name in (*suite.named("erased"), *suite.named("unseen")):
        if found := ranking(model, tokenizer, suite.banks[name]):
            sides = (f"{found[side][0]:.3f} / {found[side][1]:.3f}" for side in ("reference", "novice"))
            table.add_row(name, str(len(suite.banks[name])), *sides)
    console = Console(highlight=False)
    console.print(table)
    print_fluency(model, tokenizer, suite.concept_prompts, suite.max_new_tokens, countries_swapped, console)


if __name__ == "__main__":
    main()
