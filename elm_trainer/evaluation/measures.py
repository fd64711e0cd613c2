"""The single measurements, each on one side of a pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.answers import names_answer
from .fluency import (
    as_prompt,
    distinct_n,
    generate,
    generate_answers,
    judge_answers,
    repetition,
    reverse_perplexity,
)
from .language import LanguageDetector
from .letter_choice import score_letters
from .multiple_choice import score_choices
from .pair import ModelPair, Side
from .retention import Retention, retention
from .statistics import Figure, bootstrap_mean, bootstrap_perplexity, bootstrap_ratio, holm, mcnemar, paired_difference
from .suite import EvaluationSuite, OpenQuestion


# A prompt is as long as an option with its question, four of which make a question.
_PROMPTS_PER_QUESTION = 4


@dataclass(frozen=True)
class Items:
    """What a figure is made of.

    Attributes:
        statistic (`str`): `"mean"` of the values; `"perplexity"`, `exp(Σ values / Σ counts)`; `"ratio"`,
            `Σ values / Σ counts`; or `"set"`, one value that belongs to all items together and has no interval.
        values (`list[float]`): One value per item.
        counts (`list[float]`): Tokens behind each value, or for a `"set"` the number of its items; else empty.
        texts (`list[str]`): What the model wrote for each item; else empty.
    """

    statistic: Literal["mean", "perplexity", "ratio", "set"]
    values: list[float]
    counts: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def figure(self) -> Figure:
        """Value and 95 % bootstrap interval."""
        if self.statistic == "mean":
            return bootstrap_mean(self.values)
        if self.statistic == "perplexity":
            return bootstrap_perplexity(self.values, [int(count) for count in self.counts])
        if self.statistic == "ratio":
            return bootstrap_ratio(self.values, self.counts)
        return Figure(self.values[0], self.values[0], self.values[0], int(self.counts[0]))


def change(before: Items, after: Items) -> dict[str, Any]:
    """How a figure changed from the reference to the erased model, item by item.

    Returns:
        `dict`: `change`, the difference (for a perplexity, the ratio) with its paired 95 % interval; and `p`,
        uncorrected: McNemar's exact test where the items are verdicts, else the paired bootstrap's, or `None` where
        there is nothing to test (a divergence is never negative; a set is one item).
    """
    if before.statistic == "set":
        value = after.values[0] - before.values[0]
        return {"change": Figure(value, value, value, int(before.counts[0])).to_dict(), "p": None}
    difference, p = paired_difference(before.values, after.values, before.counts or None, after.counts or None)
    if before.statistic == "perplexity":
        # Differences of nats per token are ratios of perplexities.
        low, value, high = (float(np.exp(nats)) for nats in (difference.low, difference.value, difference.high))
        difference = Figure(value, low, high, difference.n)
    tested: float | None = p
    if before.statistic == "ratio":
        tested = None
    elif not before.counts and set(before.values) | set(after.values) <= {0.0, 1.0}:
        tested = mcnemar([bool(v) for v in before.values], [bool(v) for v in after.values])
    return {"change": difference.to_dict(), "p": tested}


def correct_p(figures: Mapping[str, dict[str, Any]]) -> None:
    """Correct the `p` of all figures that have one by Holm's method, in place."""
    tested = [figure for figure in figures.values() if figure["p"] is not None]
    for figure, p in zip(tested, holm([figure["p"] for figure in tested]), strict=True):
        figure["p"] = p


@dataclass(frozen=True)
class Setting:
    """What every measurement is given.

    Attributes:
        pair (`ModelPair`): The models.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.
        suite ([`EvaluationSuite`]): What is asked.
        judges (`Mapping`): Further judges of fluency with their own tokenizers, by name.
        temperature (`float`): Of sampled answers.
        batch_size (`int`): Questions per batch.
        seed (`int`): Seed of sampled answers.
        over_ranks (`bool`): Whether the processes of a launch share the work; then all of them must measure.
    """

    pair: ModelPair
    processing_class: PreTrainedTokenizerBase
    suite: EvaluationSuite
    judges: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    temperature: float
    batch_size: int
    seed: int
    over_ranks: bool = False

    @cached_property
    def kept(self) -> Retention:
        """What is kept of retain text: measured on both sides at once, as each figure of the second needs the first."""
        return retention(self.pair, self.processing_class, self.suite.retain_texts, over_ranks=self.over_ranks)

    @cached_property
    def languages(self) -> LanguageDetector:
        """Takes about a second to load."""
        return LanguageDetector()


def multiple_choice(setting: Setting, side: Side) -> dict[str, Items]:
    """Accuracy by log-likelihood, by that per character, by PMI, and with the question removed."""
    found = {}
    with setting.pair.use(side) as model:
        for name, questions in setting.suite.banks.items():
            scores = score_choices(
                model,
                setting.processing_class,
                questions,
                batch_size=setting.batch_size,
                description=f"{side}: {name}",
                over_ranks=setting.over_ranks,
            )
            for rule in ("pmi", "log_likelihood", "normalized", "removed"):
                found[f"multiple_choice.{name}.{rule}"] = _mean(getattr(scores, rule))
    return found


def letter_choice(setting: Setting, side: Side) -> dict[str, Items]:
    """Accuracy where the options stand lettered in the prompt and the model picks a letter."""
    with setting.pair.use(side) as model:
        return {
            f"multiple_choice.{name}.letter": _mean(
                score_letters(
                    model,
                    setting.processing_class,
                    questions,
                    batch_size=setting.batch_size,
                    over_ranks=setting.over_ranks,
                )
            )
            for name, questions in setting.suite.banks.items()
        }


def open_answers(setting: Setting, side: Side) -> dict[str, Items]:
    """Share of greedy answers to open questions that name the truth or an alias of it."""
    return _answers(setting, side, "open_answers", setting.suite.open_questions, chat=True)


def cloze(setting: Setting, side: Side) -> dict[str, Items]:
    """Share of lines whose greedy completion names the truth or an alias of it."""
    return _answers(setting, side, "cloze", setting.suite.cloze, chat=False)


def greedy_fluency(setting: Setting, side: Side) -> dict[str, Items]:
    """Seamlessness of greedy answers to prompts about the concept."""
    return _fluency(setting, side, "greedy", 0.0)


def sampled_fluency(setting: Setting, side: Side) -> dict[str, Items]:
    """Seamlessness of sampled answers to the same prompts."""
    return _fluency(setting, side, "sampled", setting.temperature)


def specificity(setting: Setting, side: Side) -> dict[str, Items]:
    """Perplexity on retain text, and the KL from the reference per token."""
    kept = setting.kept
    if side == "reference":
        nlls, divergences = kept.reference_nll, [0.0] * len(kept.tokens)
    else:
        nlls, divergences = kept.adapted_nll, kept.kl
    tokens = [float(count) for count in kept.tokens]
    return {
        "retention.perplexity": Items("perplexity", nlls, tokens),
        "retention.kl": Items("ratio", divergences, tokens),
    }


Measure: TypeAlias = Callable[[Setting, Side], dict[str, Items]]
MEASURES: dict[str, Measure] = {
    "multiple-choice": multiple_choice,
    "letter-choice": letter_choice,
    "open-answers": open_answers,
    "cloze": cloze,
    "greedy-fluency": greedy_fluency,
    "sampled-fluency": sampled_fluency,
    "specificity": specificity,
}


def _answers(
    setting: Setting, side: Side, what: str, questions: Mapping[str, Sequence[OpenQuestion]], *, chat: bool
) -> dict[str, Items]:
    every = [question for asked in questions.values() for question in asked]
    prompts = [as_prompt(setting.processing_class, q.prompt) if chat else q.prompt for q in every]
    # In one call, so that batches are full.
    with setting.pair.use(side) as model:
        answers = generate(
            model,
            setting.processing_class,
            prompts,
            max_new_tokens=setting.suite.answer_tokens,
            batch_size=_PROMPTS_PER_QUESTION * setting.batch_size,
            over_ranks=setting.over_ranks,
        )
    given = iter(answers)
    found = {}
    for name, asked in questions.items():
        texts = [next(given) for _ in asked]
        named = [names_answer(text, q.answer, q.aliases) for text, q in zip(texts, asked, strict=True)]
        found[f"{what}.{name}"] = Items("mean", [float(value) for value in named], texts=texts)
    return found


def _fluency(setting: Setting, side: Side, how: str, temperature: float) -> dict[str, Items]:
    asked = setting.suite.concept_prompts
    prompts = [as_prompt(setting.processing_class, prompt) for prompt in asked]
    with setting.pair.use(side) as model:
        answers = generate_answers(
            model,
            setting.processing_class,
            prompts,
            max_new_tokens=setting.suite.max_new_tokens,
            temperature=temperature,
            seed=setting.seed,
            # What is sampled depends on the batch.
            batch_size=32 if temperature else _PROMPTS_PER_QUESTION * setting.batch_size,
            over_ranks=setting.over_ranks,
        )
    texts = answers.texts
    with setting.pair.use("reference") as judge:
        nlls, tokens = reverse_perplexity(
            judge, setting.processing_class, prompts, texts, over_ranks=setting.over_ranks
        )
    found = {f"fluency.{how}.r_ppl": Items("perplexity", nlls, [float(count) for count in tokens], texts)}
    for name, (judge, tokenizer) in setting.judges.items():
        nlls, tokens = judge_answers(judge, tokenizer, asked, texts, over_ranks=setting.over_ranks)
        found[f"fluency.{how}.r_ppl.{name}"] = Items("perplexity", nlls, [float(count) for count in tokens])
    kept = setting.languages.kept(asked, texts)
    return found | {
        f"fluency.{how}.repetition": Items("mean", [repetition(text) for text in texts]),
        f"fluency.{how}.distinct_2": Items("set", [distinct_n(texts)], [float(len(texts))]),
        f"fluency.{how}.empty": _mean([not text.strip() for text in texts]),
        f"fluency.{how}.truncated": _mean(answers.truncated),
        # Too short to tell is no loss of the language, and is counted apart.
        f"fluency.{how}.other_language": _mean([verdict is False for verdict in kept]),
        f"fluency.{how}.undecided_language": _mean([verdict is None for verdict in kept]),
    }


def _mean(values: Sequence[bool]) -> Items:
    return Items("mean", [float(value) for value in values])
