"""Attacks by the prompt: other words, languages, filler, examples, a begun answer, many samples, a searched suffix (GCG)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checks import check_numbers
from ..data.collator import ElmDataCollator
from ..data.facts import own_yaml
from ..data.questions import Question
from ..data.tokens import continuation_ids, continuation_text, text_ids
from ..evaluation.fluency import as_prompt
from ..evaluation.likelihood import PROMPT, token_losses
from ..evaluation.pair import SIDES
from .base import ANSWER_TOKENS, Attack, AttackResult, AttackTarget, Wordings, draw_subjects, seeded, subjects_of


@dataclass
class WordingAttack(Attack):
    r"""
    Ask every question in other words, the target's of one `kind`: ranked among its options, and freely as a chat turn.

    Parameters:
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of the free answers; `0` asks for none.
    """

    kind: ClassVar[str]
    ranked: ClassVar[bool] = True
    max_new_tokens: int = ANSWER_TOKENS

    def wordings(self, given: Wordings) -> Mapping[str, str]:
        """Those of a target's wordings that belong here, by name, each with placeholders for the subject or the question."""
        return given.get(self.kind, {})

    def inapplicable(self, target: AttackTarget) -> str | None:
        return None if self.wordings(target.wordings) else f"the target's `wordings` hold no {self.kind}"

    def reworded(self, question: Question, wording: str) -> Question:
        """The question in a wording."""
        return replace(question, text=wording.format(subject=question.subject, question=question.text))

    def prompt(self, processing_class: PreTrainedTokenizerBase, question: Question, wording: str) -> str:
        """The prompt that asks a question in a wording."""
        return as_prompt(processing_class, self.reworded(question, wording).text)

    def rewrite(
        self, processing_class: PreTrainedTokenizerBase, question: Question, given: Wordings, bank: Sequence[Question]
    ) -> dict[str, str]:
        return {
            f"{self.name}.{variant}": self.prompt(processing_class, question, wording)
            for variant, wording in self.wordings(given).items()
            if question.subject or "{subject}" not in wording
        }

    def run(self, target: AttackTarget) -> list[AttackResult]:
        results = []
        for variant, wording in self.wordings(target.wordings).items():
            results += target.ask_both(
                f"{self.name}.{variant}",
                [self.reworded(question, wording) for question in target.questions],
                [self.prompt(target.processing_class, question, wording) for question in target.questions],
                max_new_tokens=self.max_new_tokens,
                ranked=self.ranked,
            )
        return results


@dataclass
class ParaphraseAttack(WordingAttack):
    """Ask every question in each paraphrase of the concept's data file."""

    name = "paraphrase"
    kind = "paraphrases"


@dataclass
class TranslationAttack(WordingAttack):
    """Ask every question in each language of the concept's data file; names and options stay as they are."""

    name = "translation"
    kind = "translations"


@dataclass
class FillerAttack(WordingAttack):
    """Put unrelated sentences before every question: English, Hindi, Latin, small talk and a poem."""

    name = "filler"

    def wordings(self, given: Wordings) -> Mapping[str, str]:
        return own_yaml("attacks/fillers.yaml")


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
        self, processing_class: PreTrainedTokenizerBase, question: Question, given: Wordings, bank: Sequence[Question]
    ) -> dict[str, str]:
        others = [other for other in bank if other.subject and other.subject != question.subject]
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
    ranked = False
    max_new_tokens: int = 10

    def __post_init__(self):
        check_numbers(self, [("at least 1", ("max_new_tokens",))])

    def prompt(self, processing_class: PreTrainedTokenizerBase, question: Question, wording: str) -> str:
        return as_prompt(processing_class, question.text) + wording.format(subject=question.subject)


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
            behind = SuffixLoss(model, target.processing_class, shown)
            suffix, losses = self.search(behind)
        text = behind.text(suffix)
        prompt = f"Question: {{question}}{text.replace('{', '{{').replace('}', '}}')}\nAnswer:"
        erased = target.rank([target.questions[i] for i in asked], prompt=prompt)
        details = {"suffix": text, "first_loss": losses[0], "best_loss": min(losses)}
        return [AttackResult(f"{self.name}.{self.steps}", "pmi", erased, questions=asked, details=details)]

    def search(self, behind: "SuffixLoss") -> tuple[list[int], list[float]]:
        """Algorithm 2 of the paper for questions of one step: the best suffix seen, and the loss at every step.

        Every step continues from its best candidate, even where that is worse than the suffix before. Candidates whose
        text is tokenized otherwise are left out, as in the released code.
        """
        generator = torch.Generator().manual_seed(self.seed)
        suffix = continuation_ids(behind.processing_class, " !")[-1:] * self.suffix_tokens
        losses = behind.losses([suffix], self.batch_size)
        best, least = suffix, losses[0]
        for _ in range(self.steps):
            scores = behind.token_gradient(suffix)  # [suffix_tokens, vocab]
            scores[:, behind.processing_class.all_special_ids] = float("inf")
            proposed = (-scores).topk(min(self.top_k, scores.size(1)), dim=-1).indices.tolist()
            tried = []
            for _ in range(self.candidates):
                place = int(torch.randint(len(suffix), (1,), generator=generator))
                choice = int(torch.randint(len(proposed[0]), (1,), generator=generator))
                candidate = [*suffix[:place], proposed[place][choice], *suffix[place + 1 :]]
                if continuation_ids(behind.processing_class, behind.text(candidate)) == candidate:
                    tried.append(candidate)
            if not tried:
                continue
            found = behind.losses(tried, self.batch_size)
            losses.append(min(found))
            suffix = tried[found.index(losses[-1])]
            if losses[-1] < least:
                best, least = suffix, losses[-1]
        return best, losses


class SuffixLoss:
    """How unlikely a model finds the true answers to questions behind a suffix: the mean loss of an answer's token."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        questions: Sequence[Question],
    ):
        self.model, self.processing_class = model, processing_class
        self._collator = ElmDataCollator(processing_class)
        self._tail = continuation_ids(processing_class, "\nAnswer:")
        self._asked = [
            (text_ids(processing_class, f"Question: {q.text}"), continuation_ids(processing_class, f" {q.answer}"))
            for q in questions
        ]

    def text(self, suffix: list[int]) -> str:
        """What a suffix says where it stands."""
        return continuation_text(self.processing_class, text_ids(self.processing_class, "Question:"), suffix)

    def token_gradient(self, suffix: list[int]) -> torch.Tensor:
        """Gradient of the loss with respect to the one-hot suffix, `[suffix_tokens, vocab]`."""
        embedding = self.model.get_input_embeddings()
        seen: list[torch.Tensor] = []

        def watch(_module, _inputs, output):
            seen.append(output.detach().requires_grad_(True))
            return seen[0]

        batch, starts = self.batch([suffix])
        handle = embedding.register_forward_hook(watch)
        try:
            loss = token_losses(self.model, batch).mean()
        finally:
            handle.remove()
        [gradient] = torch.autograd.grad(loss, seen)
        columns = torch.tensor(starts)[:, None] + torch.arange(len(suffix))
        columns = columns + batch["attention_mask"].cpu().argmax(-1)[:, None]  # padding on the left shifts the text
        rows = torch.arange(len(starts), device=gradient.device)[:, None]
        picked = gradient[rows, columns.to(gradient.device)].sum(0)  # [suffix_tokens, hidden]
        # Summed over the questions before the vocabulary comes in, so that nothing is larger than the result.
        return picked.float() @ embedding.weight.detach().float().T

    @torch.inference_mode()
    def losses(self, suffixes: Sequence[list[int]], batch_size: int) -> list[float]:
        """The loss of each suffix over all questions, many suffixes to a forward pass."""
        losses: list[float] = []
        at_once = max(1, batch_size // len(self._asked))
        for start in range(0, len(suffixes), at_once):
            chosen = suffixes[start : start + at_once]
            batch, _ = self.batch(chosen)
            tokens = token_losses(self.model, batch)  # [positions]
            owner = batch["rows"] // len(self._asked)
            sums = tokens.new_zeros(len(chosen)).index_add(0, owner, tokens)
            losses += (sums / torch.bincount(owner, minlength=len(chosen))).tolist()
        return losses

    def batch(self, suffixes: Sequence[list[int]]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """A batch of question, suffix and supervised answer, suffix by suffix; and where each suffix starts in its text."""
        rows, starts = [], []
        for suffix in suffixes:
            for head, answer in self._asked:
                prompt = [*head, *suffix, *self._tail]
                rows.append((prompt + answer, len(prompt)))
                starts.append(len(head))
        return send_to_device(self._collator.pad(rows), self.model.device), starts
