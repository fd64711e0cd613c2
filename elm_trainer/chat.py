"""What is asked about a concept, and both models' answers in one loop, a token each at a time, with how probable its terms are there."""

import copy
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from .attacks import ATTACKS, built_in_wordings, default_attacks
from .concept import load_concept
from .data.facts import FACTS, load_bank
from .data.questions import Question, names_answer, read_questions
from .data.tokens import continuation_ids, continuation_text, text_ids, text_tokenizer
from .evaluation.fluency import as_prompt, end_tokens
from .evaluation.pair import SIDES, ModelPair, Side
from .head import keep_positions


# The name under which a question is asked as it was typed.
PLAIN = "as typed"
DEFINITION = (
    "The concept's probability at a token is the probability that the model, in place of that token, goes on with one of the "
    "concept's terms, whole: the sum over the terms of the product of their tokens' probabilities, at temperature 1. The terms "
    "are the right answers about the subjects that the question names; all answers of the bank where it names none; the "
    "concept's keywords where there is no bank. A term whose first token has less than .001 counts as 0."
)
# As `generate_answers` samples.
_TOP_K = 50
# A term that begins with less cannot have more.
_LEAST_FIRST = 1e-3


@dataclass(frozen=True)
class ChatConcept:
    """What a chat knows of an erased concept."""

    name: str
    questions: Sequence[Question] = ()
    keywords: Sequence[str] = ()  # the terms where there are no questions
    wordings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # as of an `AttackTarget`

    def question(self, text: str) -> Question:
        """The bank's question of this text, or one made of it, whose subject is the first that it names."""
        wanted = " ".join(text.split()).casefold()
        for question in self.questions:
            if " ".join(question.text.split()).casefold() == wanted:
                return question
        named = self._subjects(text)
        answers = self._answers(named[:1])
        first = answers[0] if answers else ""
        return Question(text, (first,), first, subject=named[0] if named else "", aliases=tuple(answers[1:]))

    def terms(self, text: str) -> list[str]:
        """The terms whose probability is shown while a question is answered, as `DEFINITION` says."""
        question = self.question(text)
        if question in self.questions:
            return [question.answer, *question.aliases]
        named = self._subjects(text)
        found = self._answers(named) if named else self._answers({question.subject for question in self.questions})
        return found or list(self.keywords)

    def prompts(self, text: str, processing_class: PreTrainedTokenizerBase) -> dict[str, str]:
        """The prompts, in their final form, with which each built-in attack would ask a question, by `<attack>.<variant>`.

        Attacks on weights, and those that search or sample, have none.
        """
        return self._rewritten(self.question(text), processing_class)

    def prompt(self, text: str, attack: str, processing_class: PreTrainedTokenizerBase) -> str:
        """The prompt of one attack, or of `PLAIN`; raises `ValueError` for an attack that needs a question with a subject."""
        prompts = {PLAIN: as_prompt(processing_class, text)} | self.prompts(text, processing_class)
        if attack not in prompts:
            such = f", such as {self.questions[0].text!r}" if self.questions else ""
            raise ValueError(f"{attack} needs a question that names a subject of the concept's bank{such}.")
        return prompts[attack]

    def attack_names(self, processing_class: PreTrainedTokenizerBase) -> list[str]:
        """Every name that [`prompts`] can have, also of attacks that need a question with a subject."""
        asked = replace(self.questions[0], subject="?") if self.questions else Question("?", ("?",), "?", subject="?")
        named = self.prompts("?", processing_class) | self._rewritten(asked, processing_class)
        order = [*ATTACKS]
        return sorted(named, key=lambda name: order.index(name.partition(".")[0]))

    def _rewritten(self, question: Question, processing_class: PreTrainedTokenizerBase) -> dict[str, str]:
        prompts: dict[str, str] = {}
        for attack in default_attacks():
            prompts |= attack.rewrite(processing_class, question, self.wordings, self.questions)
        return prompts

    def _subjects(self, text: str) -> list[str]:
        """The subjects that a text names, in its order; not those within a longer one, as Guinea is in Papua New Guinea."""
        named = {q.subject for q in self.questions if q.subject and names_answer(text, q.subject)}
        rest, found = text, []
        for subject in sorted(named, key=len, reverse=True):
            if names_answer(rest, subject):
                found.append(subject)
                rest = re.sub(rf"(?<!\w){re.escape(subject)}(?!\w)", " ", rest, flags=re.IGNORECASE)
        return sorted(found, key=lambda subject: text.casefold().find(subject.casefold()))

    def _answers(self, subjects: Sequence[str] | set[str]) -> list[str]:
        asked = [question for question in self.questions if question.subject in subjects]
        return list(dict.fromkeys(chain.from_iterable((q.answer, *q.aliases) for q in asked)))


def load_chat_concept(name: str, bank: str | None = None) -> ChatConcept:
    """What a chat knows of a concept that [`load_concept`] takes, with the questions of the file `bank` or built-in ones.

    Raises `OSError` if a file cannot be read, and `ValueError` for a name or a file that cannot be used.
    """
    if bank is not None:
        return ChatConcept(name.partition(":")[0], read_questions(bank))
    if name in FACTS:
        return ChatConcept(name, load_bank(name), wordings=built_in_wordings(name))
    concept = load_concept(name)
    return ChatConcept(concept.name, keywords=concept.keywords)


def term_tokens(processing_class: PreTrainedTokenizerBase, terms: Sequence[str]) -> list[tuple[int, ...]]:
    """The token sequences that spell terms, behind a space and at the beginning of a line.

    None of them begins with another, so that no two can both come next and their probabilities may be added.
    """
    spelled = sorted(
        {
            tuple(ids)
            for term in terms
            if term.strip()
            for text in (f" {term.strip()}", term.strip())
            if (ids := continuation_ids(processing_class, text))
        }
    )
    # In this order what begins with another stands behind it.
    kept: list[tuple[int, ...]] = []
    for sequence in spelled:
        if not kept or sequence[: len(kept[-1])] != kept[-1]:
            kept.append(sequence)
    return kept


@dataclass(frozen=True)
class AnswerToken:
    """A token of an answer, with probabilities at temperature 1 under the model that wrote it."""

    id: int
    text: str  # what it adds; empty where only the next token completes a character
    probability: float
    concept: float | None  # that one of the concept's terms would stand in its place; `None` where there are none


@dataclass
class Answer:
    """An answer as far as it has come."""

    tokens: list[AnswerToken] = field(default_factory=list)  # without the one that ends it
    state: str = "writing"  # then "ended" by the model, or "cut off" at the longest length
    end_concept: float | None = None  # the concept's probability in place of the token that ended the answer

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def highest(self) -> float | None:
        """The largest probability of the concept at any position, the last one included."""
        values = [token.concept for token in self.tokens] + [self.end_concept]
        return max((value for value in values if value is not None), default=None)


def percent(probability: float | None) -> str:
    """A probability in percent, to one digit below ten; `"–"` where there is none."""
    if probability is None or math.isnan(probability):
        return "–"
    return f"{100 * probability:.0f}" if probability >= 0.0995 else f"{100 * probability:.1f}"


class ErasureChat:
    """Adapters on one base, each of which answers beside the base.

    Several threads may use it: a step takes the model for itself, and sets what it needs.

    Args:
        model (`PeftModel`): Base with one or more adapters.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer.
        adapters (`Mapping[str, str]`, *optional*): By the name that a user sees, the name of each adapter in the model.
            All, by the latter, by default.

    Raises:
        ValueError: if `adapters` names one that the model does not have.
    """

    def __init__(
        self, model: PeftModel, processing_class: PreTrainedTokenizerBase, adapters: Mapping[str, str] | None = None
    ):
        self.pair = ModelPair(model)
        self.model = model
        self.processing_class = text_tokenizer(processing_class)
        self.adapters = {name: name for name in model.peft_config} if adapters is None else dict(adapters)
        if missing := sorted(set(self.adapters.values()) - model.peft_config.keys()):
            raise ValueError(f"`adapters` names {missing}, but the model has {sorted(model.peft_config)}: load them.")
        self._turn = threading.Lock()

    def answer(
        self,
        prompt: str,
        terms: Sequence[str] = (),
        *,
        adapter: str | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[dict[Side, Answer]]:
        """Answer a prompt with both models, with their keys and values cached.

        Args:
            prompt (`str`): In its final form, as of [`~elm_trainer.evaluation.fluency.as_prompt`].
            terms (`Sequence[str]`, *optional*): Terms of the concept, whose probability is computed at every token.
            adapter (`str`, *optional*): One of `adapters`; the first by default.
            max_new_tokens (`int`, *optional*, defaults to `64`): Longest answer, in tokens.
            temperature (`float`, *optional*, defaults to `0.0`): Of sampling among the 50 likeliest tokens; `0` is greedy.
            seed (`int`, *optional*, defaults to `0`): Of sampling, the same for both.

        Returns:
            `Iterator[dict]`: both answers after each token of either; the same two objects, which grow.

        Raises:
            ValueError: at once, for an adapter that is not there, an empty prompt, a prompt that leaves no room for the
                answer, a length below 1 or a temperature below 0.
        """
        adapter = next(iter(self.adapters)) if adapter is None else adapter
        if adapter not in self.adapters:
            raise ValueError(f"`adapter` is {adapter!r}: use one of {', '.join(self.adapters)}.")
        if max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {max_new_tokens}: it must be at least 1.")
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"`temperature` is {temperature}: it must be at least 0, which is greedy.")
        ids = text_ids(self.processing_class, prompt)
        if not prompt.strip() or not ids:
            raise ValueError("The prompt is empty: ask something.")
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(ids) + max_new_tokens > most:
            raise ValueError(
                f"`max_new_tokens` is {max_new_tokens} and the prompt has {len(ids)} tokens, but the model reads {most} in "
                "all: shorten one of them."
            )
        sequences = term_tokens(self.processing_class, terms)
        writers = [
            _Writer(self, side, self.adapters[adapter], ids, sequences, max_new_tokens, temperature, seed)
            for side in SIDES
        ]
        # A generator of its own, so that what is wrong is raised at once.
        return self._answers(writers)

    def _answers(self, writers: "Sequence[_Writer]") -> Iterator[dict[Side, Answer]]:
        while any(writer.answer.state == "writing" for writer in writers):
            for writer in writers:
                if writer.answer.state == "writing":
                    with self._turn:
                        writer.step()
                    yield {other.side: other.answer for other in writers}


@dataclass
class _Writer:
    """One side's answer, with its cache."""

    chat: ErasureChat
    side: Side
    adapter: str
    prompt: list[int]
    terms: Sequence[tuple[int, ...]]
    most: int
    temperature: float
    seed: int
    answer: Answer = field(default_factory=Answer)

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(self.seed)
        self._ends = set(end_tokens(self.chat.model, self.chat.processing_class))
        self._cache: Any = None
        self._next, self._said = list(self.prompt), ""

    @torch.no_grad()
    def step(self) -> None:
        """Write a token, or end."""
        chat = self.chat
        if chat.model.active_adapters != [self.adapter]:
            chat.model.set_adapter(self.adapter)
            chat.model.requires_grad_(False)  # `set_adapter` made it trainable
        with chat.pair.use(self.side) as model:
            logits = self._forward(model)
            probabilities = logits.softmax(-1)
            concept = self._concept(model, probabilities)
        token = self._choose(logits)
        if token in self._ends:
            self.answer.state, self.answer.end_concept = "ended", concept
            return
        written = [*(said.id for said in self.answer.tokens), token]
        text = continuation_text(chat.processing_class, self.prompt, written)
        # A character of several tokens is shown once it is whole.
        whole = text.rstrip("\ufffd") if len(written) < self.most else text
        new = whole[len(self._said) :] if whole.startswith(self._said) else ""
        self._said += new
        self.answer.tokens.append(AnswerToken(token, new, float(probabilities[token]), concept))
        self._next = [token]
        if len(written) >= self.most:
            self.answer.state = "cut off"

    def _forward(self, model: Any) -> torch.Tensor:
        """Logits of the next token, `[vocab]`; what was said last goes into the cache."""
        ids = torch.tensor([self._next], device=model.device)
        last = torch.tensor([len(self._next) - 1], device=model.device)
        with keep_positions(model.get_output_embeddings(), last):
            output = model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise ValueError(
                f"The model, a {model.config.model_type}, keeps no keys and values to go on from: chat with one that does."
            )
        return output.logits[0, -1].float().cpu()

    def _concept(self, model: Any, probabilities: torch.Tensor) -> float | None:
        """Sum over the terms of the product of their tokens' probabilities."""
        if not self.terms:
            return None
        likely = [term for term in self.terms if probabilities[term[0]] >= _LEAST_FIRST]
        total = sum((float(probabilities[term[0]]) for term in likely if len(term) == 1), 0.0)
        longer = [term for term in likely if len(term) > 1]
        if longer:
            # Each goes on from a copy of the cache; what pads the shorter ones stands behind and is not seen.
            width = max(map(len, longer)) - 1
            rows = torch.tensor([[*term[:-1], *[0] * (width - len(term) + 1)] for term in longer], device=model.device)
            cache = copy.deepcopy(self._cache)
            cache.batch_repeat_interleave(len(longer))
            output = model(input_ids=rows, past_key_values=cache, use_cache=True)
            found = output.logits.float().log_softmax(-1).cpu()  # [terms, width, vocab]
            for row, term in enumerate(longer):
                rest = sum(float(found[row, place, token]) for place, token in enumerate(term[1:]))
                total += float(probabilities[term[0]]) * float(torch.tensor(rest).exp())
        return min(total, 1.0)  # rounding

    def _choose(self, logits: torch.Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        top = logits.topk(min(_TOP_K, len(logits)))
        weights = (top.values / self.temperature).softmax(-1)
        return int(top.indices[torch.multinomial(weights, 1, generator=self._random)])
