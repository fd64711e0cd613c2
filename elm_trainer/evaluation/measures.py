"""What is measured on one side of a pair, item by item: one function a measure."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, Literal, TypeAlias

import torch
from accelerate.utils import send_to_device
from scipy.stats import entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.collator import ElmDataCollator
from ..data.questions import PLAIN, given_answer, names_answer
from ..data.tokens import text_tokenizer, tokenize
from ..objectives import text_sums
from .benchmarks import (
    HarnessTasks,
    answer_tokens,
    free_prompts,
    model_utility,
    sample_scores,
    score_answers,
    score_likelihoods,
)
from .fluency import (
    Generations,
    Generator,
    as_prompt,
    distinct_n,
    end_tokens,
    generate_answers,
    language_kept,
    repetition,
)
from .likelihood import position_logits, read_by_judge, reverse_perplexity, score_choices, score_letters
from .pair import SIDES, ModelPair, Side, run_batches
from .statistics import Items
from .suite import EvaluationSuite


logger = logging.get_logger(__name__)
# A prompt is as long as an option with its question, four of which make a question.
_PROMPTS_PER_QUESTION = 4


@dataclass(frozen=True)
class Retention:
    """Sums over each text's tokens, in nats: negative log-likelihoods of both models and `KL(reference ‖ adapted)`."""

    reference_nll: list[float]
    adapted_nll: list[float]
    kl: list[float]
    tokens: list[int]


@torch.no_grad()
def retention(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 8,
    over_ranks: bool = False,
) -> Retention:
    """Compare the erased model with its reference on the first `max_length` tokens of retain texts that training did not see."""
    collator = ElmDataCollator(processing_class)

    def run(batch: Sequence[str]) -> list[list[Any]]:
        rows = [(text.ids[:max_length], 0) for text in tokenize(processing_class, batch)]
        padded = collator.pad(rows)
        labels = padded["labels"][padded["rows"], padded["columns"] + 1]
        log_probs = {}
        for side in SIDES:
            with pair.use(side) as model:
                logits = position_logits(model, send_to_device(padded, model.device))
            log_probs[side] = logits.float().log_softmax(-1)
        reference = log_probs["reference"]
        adapted = log_probs["erased"].to(reference.device)  # two full models may lie on two devices
        chosen = labels.to(reference.device)[:, None]
        values = (
            -reference.gather(-1, chosen)[:, 0],
            -adapted.gather(-1, chosen)[:, 0],
            (reference.exp() * (reference - adapted)).sum(-1),
        )
        place = padded["rows"].to(reference.device)
        sums = [text_sums(value, place, len(rows)).tolist() for value in values]
        return [*sums, torch.bincount(padded["rows"], minlength=len(rows)).tolist()]

    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    found = run_batches(run, batches, *pair.models, over_ranks=over_ranks)
    return Retention(*([list(chain(*column)) for column in zip(*found, strict=True)] or [[], [], [], []]))


@dataclass(frozen=True)
class Setting:
    """What every measurement is given.

    Attributes:
        judges (`Mapping`): Further judges of fluency with their own tokenizers, by name.
        temperature (`float`), seed (`int`): Of sampled answers.
        batch_size (`int`): Questions per batch.
        over_ranks (`bool`): See [`run_batches`].
        generator ([`Generator`], *optional*): Who writes free answers; transformers by default.
    """

    pair: ModelPair
    processing_class: PreTrainedTokenizerBase
    suite: EvaluationSuite
    judges: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    temperature: float
    batch_size: int
    seed: int
    over_ranks: bool = False
    generator: Generator | None = None

    def answers(
        self,
        side: Side,
        prompts: Sequence[str],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Generations:
        """What the model of a side writes behind prompts in their final form: see [`generate_answers`]."""
        asked: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        with self.pair.use(side) as model:
            if self.generator is not None:
                ends = end_tokens(model, text_tokenizer(self.processing_class))
                return self.generator(side, self.processing_class, prompts, ends=ends, **asked)
            # What is sampled depends on the batch.
            size = 32 if temperature else _PROMPTS_PER_QUESTION * self.batch_size
            return generate_answers(
                model, self.processing_class, prompts, batch_size=size, over_ranks=self.over_ranks, **asked
            )

    @cached_property
    def kept(self) -> Retention:
        """What is kept of retain text: measured on both sides at once, as the second's divergence needs the first."""
        return retention(self.pair, self.processing_class, self.suite.retain_texts, over_ranks=self.over_ranks)

    @cached_property
    def tasks(self) -> HarnessTasks:
        """The suite's tasks of lm-evaluation-harness, whose data may come from the Hub."""
        suite = self.suite
        return HarnessTasks(suite.harness, num_fewshot=suite.num_fewshot, limit=suite.limit)


def multiple_choice(setting: Setting, side: Side) -> dict[str, Items]:
    """Accuracy by log-likelihood, by that per character, by PMI, and with the question removed."""
    banks = setting.suite.banks
    # In one call, so that what several banks have in common is scored once.
    with setting.pair.use(side) as model:
        scores = score_choices(
            model,
            setting.processing_class,
            [question for questions in banks.values() for question in questions],
            batch_size=setting.batch_size,
            description=f"{side}: multiple choice",
            over_ranks=setting.over_ranks,
            sharing=partial(setting.pair.below.run, side),
        )
    found, start = {}, 0
    for name, questions in banks.items():
        part = slice(start, start + len(questions))
        chances = [1 / len(question.options) for question in questions]
        groups = [question.subject or question.text for question in questions]
        for rule in ("pmi", "log_likelihood", "normalized", "removed"):
            values = [float(verdict) for verdict in getattr(scores, rule)[part]]
            found[f"multiple_choice.{name}.{rule}"] = Items("mean", values, chances=chances, groups=groups)
        start = part.stop
    return found


def letter_choice(setting: Setting, side: Side) -> dict[str, Items]:
    """Accuracy on plain questions where the options stand lettered in the prompt and the model picks a letter."""
    found = {}
    with setting.pair.use(side) as model:
        for name, questions in setting.suite.banks.items():
            if all(question.family == PLAIN for question in questions):
                verdicts = score_letters(
                    model,
                    setting.processing_class,
                    questions,
                    batch_size=setting.batch_size,
                    over_ranks=setting.over_ranks,
                )
                found[f"multiple_choice.{name}.letter"] = _share(verdicts)
    return found


def free_answers(setting: Setting, side: Side, what: Literal["open_answers", "cloze"]) -> dict[str, Items]:
    """Share of greedy answers to open questions, or completions of lines, that name the truth or an alias of it.

    Of an erased bank also how far answers differ: `commonest` is the share of all answers that the most frequent wrong
    one has, `entropy` that of the answers in nats, and `evenness` the same as a share of its largest value, `log n`.
    """
    questions = setting.suite.cloze if what == "cloze" else setting.suite.open_questions
    every = [question for asked in questions.values() for question in asked]
    prompts = [q.prompt if what == "cloze" else as_prompt(setting.processing_class, q.prompt) for q in every]
    # In one call, so that batches are full.
    texts_left = iter(setting.answers(side, prompts, setting.suite.answer_tokens).texts)
    found = {}
    for name, asked in questions.items():
        texts = [next(texts_left) for _ in asked]
        named = [names_answer(text, q.answer, q.aliases) for text, q in zip(texts, asked, strict=True)]
        found[f"{what}.{name}"] = Items("mean", [float(value) for value in named], texts=texts)
        if setting.suite.roles.get(name) == "erased":
            given = [given_answer(text, q.prompt) for text, q in zip(texts, asked, strict=True)]
            wrong = Counter(answer for answer, right in zip(given, named, strict=True) if not right)
            count, nats = len(texts), float(entropy([*Counter(given).values()]))
            spread = {
                "commonest": max(wrong.values(), default=0) / count,
                "entropy": nats,
                "evenness": nats / math.log(count) if count > 1 else 0.0,
            }
            found |= {f"{what}.{name}.{key}": Items("set", [value], [float(count)]) for key, value in spread.items()}
    return found


def fluency(setting: Setting, side: Side, how: Literal["greedy", "sampled"]) -> dict[str, Items]:
    """Seamlessness of greedy or sampled answers to prompts about the concept."""
    temperature = setting.temperature if how == "sampled" else 0.0
    asked = setting.suite.concept_prompts
    prompts = [as_prompt(setting.processing_class, prompt) for prompt in asked]
    answers = setting.answers(side, prompts, setting.suite.max_new_tokens, temperature, setting.seed)
    texts = answers.texts
    with setting.pair.use("reference") as judge:
        nlls, tokens = reverse_perplexity(
            judge, setting.processing_class, prompts, texts, over_ranks=setting.over_ranks
        )
    found = {f"fluency.{how}.r_ppl": Items("perplexity", nlls, [float(count) for count in tokens], texts)}
    for name, (judge, tokenizer) in setting.judges.items():
        nlls, tokens = reverse_perplexity(
            judge, tokenizer, *read_by_judge(tokenizer, asked, texts), over_ranks=setting.over_ranks
        )
        found[f"fluency.{how}.r_ppl.{name}"] = Items("perplexity", nlls, [float(count) for count in tokens])
    kept = language_kept(asked, texts)
    return found | {
        f"fluency.{how}.repetition": Items("mean", [repetition(text) for text in texts]),
        f"fluency.{how}.distinct_2": Items("set", [distinct_n(texts)], [float(len(texts))]),
        f"fluency.{how}.empty": _share([not text.strip() for text in texts]),
        f"fluency.{how}.truncated": _share(answers.truncated),
        # Too short to tell is no loss of the language, and is counted apart.
        f"fluency.{how}.other_language": _share([verdict is False for verdict in kept]),
        f"fluency.{how}.undecided_language": _share([verdict is None for verdict in kept]),
    }


def benchmarks(setting: Setting, side: Side) -> dict[str, Items]:
    """What TOFU, MUSE and RWKU measure: see [`score_answers`], [`score_likelihoods`] and [`model_utility`]."""
    suite = setting.suite
    with setting.pair.use(side) as model:
        found = score_likelihoods(
            model,
            setting.processing_class,
            suite.benchmarks,
            suite.retained,
            batch_size=setting.batch_size,
            over_ranks=setting.over_ranks,
        )
    for asked in suite.benchmarks:
        prompts = free_prompts(setting.processing_class, asked)
        answers = setting.answers(side, prompts, answer_tokens(asked))
        found |= score_answers(setting.processing_class, asked, answers.texts)
    return {f"benchmarks.{name}": items for name, items in (found | model_utility(found)).items()}


def harness(setting: Setting, side: Side) -> dict[str, Items]:
    """What tasks of lm-evaluation-harness score, document by document."""
    with setting.pair.use(side) as model:
        found = setting.tasks.run(
            model, setting.processing_class, batch_size=setting.batch_size, over_ranks=setting.over_ranks
        )
    return {f"harness.{name}": Items("mean", values) for name, values in sample_scores(setting.tasks, found).items()}


def specificity(setting: Setting, side: Side) -> dict[str, Items]:
    """Perplexity on retain text, and the KL from the reference per token."""
    kept = setting.kept
    nlls = kept.reference_nll if side == "reference" else kept.adapted_nll
    divergences = [0.0] * len(kept.tokens) if side == "reference" else kept.kl
    tokens = [float(count) for count in kept.tokens]
    return {
        "retention.perplexity": Items("perplexity", nlls, tokens),
        "retention.kl": Items("ratio", divergences, tokens),
    }


def _share(verdicts: Sequence[bool]) -> Items:
    return Items("mean", [float(verdict) for verdict in verdicts])


Measure: TypeAlias = Callable[[Setting, Side], dict[str, Items]]
MEASURES: dict[str, Measure] = {
    "multiple-choice": multiple_choice,
    "letter-choice": letter_choice,
    "open-answers": partial(free_answers, what="open_answers"),
    "cloze": partial(free_answers, what="cloze"),
    "greedy-fluency": partial(fluency, how="greedy"),
    "sampled-fluency": partial(fluency, how="sampled"),
    "specificity": specificity,
    "benchmarks": benchmarks,
    "harness": harness,
}
INSIDE = "inside"
# Only what a suite names of its own is measured by these, and most suites name none.
_NAMED = ("benchmarks", "harness")
# What of a suite a measure is made of.
_NEEDS = {
    "multiple-choice": ("banks",),
    "letter-choice": ("banks",),
    "open-answers": ("open_questions",),
    "cloze": ("cloze",),
    "greedy-fluency": ("concept_prompts",),
    "sampled-fluency": ("concept_prompts",),
    "specificity": ("retain_texts",),
    "benchmarks": ("benchmarks",),
    "harness": ("harness",),
    INSIDE: ("forget_texts", "retain_texts"),
}


def measurable(names: str | Sequence[str] | None, suite: EvaluationSuite) -> list[str]:
    """The measures, of `MEASURES` and `"inside"` or those that are named, for which a suite holds what they need; others are logged."""
    asked = list(_NEEDS) if names is None else [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in asked if name not in _NEEDS]:
        raise ValueError(f"`measures` names {unknown}, which do not exist; use: {', '.join(_NEEDS)}.")
    lacking = {name: [need for need in _NEEDS[name] if not getattr(suite, need)] for name in asked}
    # The probes ask about the concept, and in the plain form.
    if INSIDE in lacking and not any(q.family == PLAIN for name in suite.named("erased") for q in suite.banks[name]):
        lacking[INSIDE].append('banks of the role "erased"')
    left = [name for name in asked if not lacking[name]]
    if not left:
        raise ValueError(f"`measures` is {asked}, but the suite holds nothing of what they need: {lacking}.")
    everything = set(MEASURES) <= set(asked)
    for name in asked:
        if lacking[name] and not (everything and name in _NAMED):
            logger.warning(f"{name} is not measured: the suite has no {' and no '.join(lacking[name])}.")
    return left
