"""Attacks by the prompt: other words, languages, filler, examples, a begun answer, many samples, a searched suffix (GCG)."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import ClassVar

import torch
import yaml
from accelerate.utils import send_to_device
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_numbers
from ..data.collator import ElmDataCollator
from ..data.questions import Question
from ..data.tokens import continuation_ids, continuation_text, text_ids
from ..evaluation.fluency import as_prompt
from ..evaluation.likelihood import PROMPT, token_losses
from ..evaluation.pair import SIDES
from .base import ANSWER_TOKENS, Attack, AttackResult, AttackTarget, draw_subjects, seeded, subjects_of


class WordingAttack(Attack):
    """An attack in prepared wordings: the target's of one `kind`."""

    kind: ClassVar[str]

    def wordings(self, given: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
        """Those of a target's wordings that belong here, by name, each with placeholders for the subject or the question."""
        return given.get(self.kind, {})

    def inapplicable(self, target: AttackTarget) -> str | None:
        return None if self.wordings(target.wordings) else f"the target's `wordings` hold no {self.kind}"

    def rewrite(
        self,
        processing_class: PreTrainedTokenizerBase,
        question: Question,
        wordings: Mapping[str, Mapping[str, str]],
        questions: Sequence[Question] = (),
    ) -> dict[str, str]:
        return {
            f"{self.name}.{variant}": self.prompt(processing_class, question, wording)
            for variant, wording in self.wordings(wordings).items()
            if question.subject or "{subject}" not in wording
        }

    @abstractmethod
    def prompt(self, processing_class: PreTrainedTokenizerBase, question: Question, wording: str) -> str:
        """The prompt that asks a question in a wording."""


@dataclass
class RewordingAttack(WordingAttack):
    r"""
    Ask every question in other words: ranked among its options, and freely as a chat turn.

    Parameters:
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of the free answers; `0` asks for none.
    """

    max_new_tokens: int = ANSWER_TOKENS

    def reworded(self, question: Question, wording: str) -> Question:
        """The question in a wording."""
        return replace(question, text=wording.format(subject=question.subject, question=question.text))

    def prompt(self, processing_class: PreTrainedTokenizerBase, question: Question, wording: str) -> str:
        return as_prompt(processing_class, self.reworded(question, wording).text)

    def run(self, target: AttackTarget) -> list[AttackResult]:
        results = []
        for variant, wording in self.wordings(target.wordings).items():
            asked = [self.reworded(question, wording) for question in target.questions]
            prompts = [self.prompt(target.processing_class, question, wording) for question in target.questions]
            results += target.ask_both(f"{self.name}.{variant}", asked, prompts, max_new_tokens=self.max_new_tokens)
        return results


@dataclass
class ParaphraseAttack(RewordingAttack):
    """Ask every question in each paraphrase of the concept's data file."""

    name = "paraphrase"
    kind = "paraphrases"


@dataclass
class TranslationAttack(RewordingAttack):
    """Ask every question in each language of the concept's data file; names and options stay as they are."""

    name = "translation"
    kind = "translations"


@dataclass
class FillerAttack(RewordingAttack):
    """Put unrelated sentences before every question: English, Hindi, Latin, small talk and a poem."""

    name = "filler"

    def wordings(self, given: Mapping[str, Mapping[str, str]]) -> Mapping[str, str]:
        text = (files("elm_trainer.data") / "attacks" / "fillers.yaml").read_text(encoding="utf-8")
        return yaml.safe_load(text)


@dataclass
class FewShotAttack(Attack):
    r"""
    Put solved questions about other subjects before each question.

    Parameters:
        shots (`int`, *optional*, defaults to `5`): Solved questions.
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of the free answers; `0` asks for none.
    """

    name = "few-shot"
    shots: int = 5
    max_new_tokens: int = ANSWER_TOKENS

    def inapplicable(self, target: AttackTarget) -> str | None:
        count = len(subjects_of(target.questions))
        return None if self.shots < count else f"{self.shots} shots leave none of {count} subjects to ask"

    def run(self, target: AttackTarget) -> list[AttackResult]:
        count = len(subjects_of(target.questions))
        if not 0 < self.shots < count:
            raise ValueError(
                f"`shots` is {self.shots}: use at least 1 and fewer than the {count} subjects asked about."
            )
        solved, asked = draw_subjects(target.questions, self.shots, self.seed)
        questions = [target.questions[index] for index in asked]
        prompt = self.examples(solved)
        prompts = [prompt.format(question=question.text) for question in questions]
        return target.ask_both(
            f"{self.name}.{self.shots}", questions, prompts,
            indices=asked, prompt=prompt, max_new_tokens=self.max_new_tokens,
        )  # fmt: skip

    def examples(self, solved: Sequence[Question]) -> str:
        """Solved questions, and behind them the place of the one to ask, `{question}`."""
        examples = "".join(f"{PROMPT.format(question=q.text)} {q.answer}\n\n" for q in solved)
        return examples.replace("{", "{{").replace("}", "}}") + PROMPT

    def rewrite(
        self,
        processing_class: PreTrainedTokenizerBase,
        question: Question,
        wordings: Mapping[str, Mapping[str, str]],
        questions: Sequence[Question] = (),
    ) -> dict[str, str]:
        others = [other for other in questions if other.subject and other.subject != question.subject]
        if not 0 < self.shots <= len(subjects_of(others)):
            return {}
        solved, _ = draw_subjects(others, self.shots, self.seed)
        return {f"{self.name}.{self.shots}": self.examples(solved).format(question=question.text)}


@dataclass
class PrefillingAttack(WordingAttack):
    r"""
    Begin the assistant's turn with words that leave only the answer to say, and let the model continue greedily.

    Parameters:
        max_new_tokens (`int`, *optional*, defaults to `10`): Length of the continuation.
    """

    name = "prefilling"
    kind = "prefills"
    max_new_tokens: int = 10

    def __post_init__(self):
        check_numbers(self, [("at least 1", ("max_new_tokens",))])

    def prompt(self, processing_class: PreTrainedTokenizerBase, question: Question, wording: str) -> str:
        return as_prompt(processing_class, question.text) + wording.format(subject=question.subject)

    def run(self, target: AttackTarget) -> list[AttackResult]:
        results = []
        for variant, wording in self.wordings(target.wordings).items():
            prompts = [self.prompt(target.processing_class, question, wording) for question in target.questions]
            said = {side: target.answer(prompts, side=side, max_new_tokens=self.max_new_tokens) for side in SIDES}
            results.append(AttackResult(f"{self.name}.{variant}", "names_answer", said["erased"], said["reference"]))
        return results


@dataclass
class BestOfNAttack(Attack):
    r"""
    Sample several answers to each question; one that names the truth is enough.

    Parameters:
        n (`int`, *optional*, defaults to `8`): Answers per question.
        temperature (`float`, *optional*, defaults to `1.2`): Sampling temperature.
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of an answer.
    """

    name = "best-of-n"
    n: int = 8
    temperature: float = 1.2
    max_new_tokens: int = ANSWER_TOKENS

    def __post_init__(self):
        check_numbers(self, [("at least 1", ("n", "max_new_tokens")), ("above 0", ("temperature",))])

    def run(self, target: AttackTarget) -> list[AttackResult]:
        prompts = [as_prompt(target.processing_class, question.text) for question in target.questions] * self.n
        count = len(target.questions)
        right = {}
        for side in SIDES:
            # Each side draws from the same seed.
            with seeded(self.seed, target.pair.erased.device):
                said = target.answer(
                    prompts, side=side, max_new_tokens=self.max_new_tokens, temperature=self.temperature
                )
            right[side] = [any(said[index::count]) for index in range(count)]
        return [AttackResult(f"{self.name}.{self.n}", "names_answer", right["erased"], right["reference"])]


@dataclass
class GcgAttack(Attack):
    r"""
    Search for one suffix that makes true answers likely on some questions, and test it on the others.

    A suffix searched for a single question can simply spell the answer; one that serves other subjects cannot.

    Parameters:
        steps (`int`, *optional*, defaults to `10`): Steps of the search (the paper: 500).
        candidates (`int`, *optional*, defaults to `8`): Suffixes tried per step (the paper: 512).
        top_k (`int`, *optional*, defaults to `64`): Replacements per position that the gradient proposes (the paper: 256).
        suffix_tokens (`int`, *optional*, defaults to `8`): Length of the suffix (the paper: 20).
        shown (`int`, *optional*, defaults to `6`): Subjects the suffix is searched on.
        batch_size (`int`, *optional*, defaults to `64`): Texts per forward pass of the candidates.
    """

    name = "gcg"
    steps: int = 10
    candidates: int = 8
    top_k: int = 64
    suffix_tokens: int = 8
    shown: int = 6
    batch_size: int = 64

    def __post_init__(self):
        check_numbers(self, [("at least 1", ("steps", "candidates", "top_k", "suffix_tokens", "shown", "batch_size"))])

    def run(self, target: AttackTarget) -> list[AttackResult]:
        count = len(subjects_of(target.questions))
        if self.shown >= count:
            raise ValueError(f"`shown` is {self.shown}: use fewer than the {count} subjects asked about.")
        shown, asked = draw_subjects(target.questions, self.shown, self.seed)
        with target.pair.use("erased") as model:
            suffix, losses = self.search(model, target.processing_class, shown)
        text = _suffix_text(target.processing_class, suffix)
        prompt = f"Question: {{question}}{text.replace('{', '{{').replace('}', '}}')}\nAnswer:"
        erased = target.rank([target.questions[i] for i in asked], prompt=prompt)
        details = {"suffix": text, "first_loss": losses[0], "best_loss": min(losses)}
        return [AttackResult(f"{self.name}.{self.steps}", "pmi", erased, questions=asked, details=details)]

    def search(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        questions: Sequence[Question],
    ) -> tuple[list[int], list[float]]:
        """Algorithm 2 of the paper for questions of one step: the best suffix seen, and the loss at every step.

        Every step continues from its best candidate, even where that is worse than the suffix before. Candidates whose
        text is tokenized otherwise are left out, as in the released code.
        """
        generator = torch.Generator().manual_seed(self.seed)
        suffix = continuation_ids(processing_class, " !")[-1:] * self.suffix_tokens
        with torch.inference_mode():
            losses = candidate_losses(model, processing_class, questions, [suffix], self.batch_size)
        best, least = suffix, losses[0]
        for _ in range(self.steps):
            scores = token_gradient(model, processing_class, questions, suffix)  # [suffix_tokens, vocab]
            scores[:, processing_class.all_special_ids] = float("inf")
            proposed = (-scores).topk(min(self.top_k, scores.size(1)), dim=-1).indices.tolist()
            tried = []
            for _ in range(self.candidates):
                place = int(torch.randint(len(suffix), (1,), generator=generator))
                choice = int(torch.randint(len(proposed[0]), (1,), generator=generator))
                candidate = [*suffix[:place], proposed[place][choice], *suffix[place + 1 :]]
                if continuation_ids(processing_class, _suffix_text(processing_class, candidate)) == candidate:
                    tried.append(candidate)
            if not tried:
                continue
            with torch.inference_mode():
                found = candidate_losses(model, processing_class, questions, tried, self.batch_size)
            losses.append(min(found))
            suffix = tried[found.index(losses[-1])]
            if losses[-1] < least:
                best, least = suffix, losses[-1]
        return best, losses


def _suffix_text(processing_class: PreTrainedTokenizerBase, suffix: list[int]) -> str:
    return continuation_text(processing_class, text_ids(processing_class, "Question:"), suffix)


def token_gradient(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    suffix: list[int],
) -> torch.Tensor:
    """Gradient of the loss with respect to the one-hot suffix, `[suffix_tokens, vocab]`."""
    embedding = model.get_input_embeddings()
    seen: list[torch.Tensor] = []

    def watch(_module, _inputs, output):
        seen.append(output.detach().requires_grad_(True))
        return seen[0]

    batch, starts = _batch(processing_class, questions, [suffix], model.device)
    handle = embedding.register_forward_hook(watch)
    try:
        loss = token_losses(model, batch).mean()
    finally:
        handle.remove()
    [gradient] = torch.autograd.grad(loss, seen)
    columns = torch.tensor(starts)[:, None] + torch.arange(len(suffix))
    columns = columns + batch["attention_mask"].cpu().argmax(-1)[:, None]  # padding on the left shifts the text
    rows = torch.arange(len(starts), device=gradient.device)[:, None]
    picked = gradient[rows, columns.to(gradient.device)].sum(0)  # [suffix_tokens, hidden]
    # Summed over the questions before the vocabulary comes in, so that nothing is larger than the result.
    return picked.float() @ embedding.weight.detach().float().T


def candidate_losses(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    suffixes: Sequence[list[int]],
    batch_size: int,
) -> list[float]:
    """Mean loss per answer token of each suffix over all questions, many suffixes to a forward pass."""
    losses: list[float] = []
    at_once = max(1, batch_size // len(questions))
    for start in range(0, len(suffixes), at_once):
        chosen = suffixes[start : start + at_once]
        batch, _ = _batch(processing_class, questions, chosen, model.device)
        tokens = token_losses(model, batch)  # [positions]
        owner = batch["rows"] // len(questions)
        sums = tokens.new_zeros(len(chosen)).index_add(0, owner, tokens)
        losses += (sums / torch.bincount(owner, minlength=len(chosen))).tolist()
    return losses


def _batch(
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    suffixes: Sequence[list[int]],
    device: torch.device,
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """A batch of question, suffix and supervised answer, suffix by suffix; and where each suffix starts in its text."""
    rows, starts = [], []
    tail = continuation_ids(processing_class, "\nAnswer:")
    texts = [
        (text_ids(processing_class, f"Question: {q.text}"), continuation_ids(processing_class, f" {q.answer}"))
        for q in questions
    ]
    for suffix in suffixes:
        for head, answer in texts:
            prompt = [*head, *suffix, *tail]
            rows.append((prompt + answer, len(prompt)))
            starts.append(len(head))
    return send_to_device(ElmDataCollator(processing_class).pad(rows), device), starts
