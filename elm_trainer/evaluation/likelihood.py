"""Log-likelihoods: of continuations, of the options of multiple choice, and of answers under a judge (R-PPL)."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from string import ascii_uppercase
from typing import TypeAlias

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.collator import ElmDataCollator
from ..data.packing import PrefixTree, additive_mask, obeys_masks, sharing_rows
from ..data.questions import Question
from ..data.tokens import continuation_ids, text_tokenizer, tokenize, tokenize_pairs
from ..head import keep_positions
from ..modeling import evaluating
from ..objectives import text_sums
from .fluency import as_prompt
from .pair import run_batches


Sharing: TypeAlias = Callable[[Hashable, Callable[[], torch.Tensor]], torch.Tensor]
# What a model is given, and of each sequence the flat positions there that predict its continuation.
_Batch: TypeAlias = tuple[dict[str, torch.Tensor], Sequence[Sequence[int]]]
PROMPT = "Question: {question}\nAnswer:"
BARE_PROMPT = "Answer:"
# What stands for `BARE_PROMPT` where options answer a turn of chat: a turn in which nothing was asked. SmolLM2-135M
# finds .66 of the capitals by PMI so, and .56 where options are discounted by their likelihood after "Answer:".
BARE_TURN = ""
_OPTIONS = 4


def log_likelihoods(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int = 64,
    description: str = "Log-likelihoods",
    over_ranks: bool = False,
    sharing: Sharing | None = None,
) -> list[float]:
    """Sum of the log-probabilities of a continuation's tokens after its prompt, in nats.

    Prompt and continuation are tokenized as one text; a token across the seam counts as continuation. Prompts and
    continuations that begin alike are packed into one row as the branches of a tree, in which a token sees its own
    branch only: every distinct prefix is computed once, and nothing is padded. Models that such a mask would not suit
    (state spaces, ALiBi, flash attention, texts longer than a sliding window, code from outside transformers) get one
    padded row for each pair instead.

    Args:
        pairs: Prompts and their continuations, with the space between them.
        batch_size: Most pairs in a forward pass.
        over_ranks: See [`run_batches`].
        sharing: Runs a forward, given what tells its inputs from others; see [`SharedLayers.run`].

    Raises:
        ValueError: if a prompt or a continuation has no token.
    """
    sequences = tokenize_pairs(processing_class, pairs)
    for (prompt, continuation), (ids, first) in zip(pairs, sequences, strict=True):
        if not 0 < first < len(ids):
            raise ValueError(
                f"Prompt {prompt!r} with continuation {continuation!r} leaves nothing to predict: neither may be empty."
            )
    packed = obeys_masks(model, max((len(ids) for ids, _ in sequences), default=0))
    # What begins alike shares a pack, what is of one length shares a padded batch.
    batches = sharing_rows([ids[:-1] for ids, _ in sequences], batch_size, tuple if packed else len)

    def run(batch: list[int]) -> list[float]:
        members = [sequences[index] for index in batch]
        return _sums(model, members, *(_packed(model, members) if packed else _padded(members)), sharing)

    with evaluating(model):
        found = run_batches(run, batches, model, over_ranks=over_ranks, description=description)
    totals = dict(zip(chain(*batches), chain(*found), strict=True))
    return [totals[index] for index in range(len(sequences))]


def _packed(model: PreTrainedModel | PeftModel, sequences: Sequence[tuple[list[int], int]]) -> _Batch:
    """Sequences sorted by their tokens as a tree in one row; nothing is predicted from the last token."""
    tree = PrefixTree.of([ids[:-1] for ids, _ in sequences])
    inputs = {
        "input_ids": torch.tensor([tree.tokens]),
        "position_ids": torch.tensor([tree.depths]),
        "attention_mask": additive_mask(tree.seen(), model.get_input_embeddings().weight.dtype)[None, None],
    }
    return inputs, [path[first - 1 :] for (_, first), path in zip(sequences, tree.paths, strict=True)]


def _padded(sequences: Sequence[tuple[list[int], int]]) -> _Batch:
    """Sequences in rows of their own, padded on the right, where no causal model sees it."""
    input_ids = pad_sequence([torch.tensor(ids[:-1]) for ids, _ in sequences], batch_first=True)
    mask = pad_sequence([torch.ones(len(ids) - 1, dtype=torch.long) for ids, _ in sequences], batch_first=True)
    starts = [row * input_ids.size(1) for row in range(len(sequences))]
    places = [range(at + first - 1, at + len(ids) - 1) for at, (ids, first) in zip(starts, sequences, strict=True)]
    return {"input_ids": input_ids, "attention_mask": mask}, places


@torch.no_grad()
def _sums(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[tuple[list[int], int]],
    inputs: dict[str, torch.Tensor],
    places: Sequence[Sequence[int]],
    sharing: Sharing | None,
) -> list[float]:
    """Of each sequence the sum over its continuation, by one forward pass."""
    device = model.device
    kept, rows = np.unique(np.concatenate(places), return_inverse=True)
    targets = [token for ids, first in sequences for token in ids[first:]]

    def forward() -> torch.Tensor:
        return model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False).logits

    with keep_positions(model.get_output_embeddings(), torch.from_numpy(kept).to(device)):
        if sharing is None:
            found = forward()
        else:
            # A tree's mask follows from the depths of its tokens.
            found = sharing(tuple((n, t.numpy().tobytes()) for n, t in inputs.items() if t.dim() == 2), forward)
    logits = found[0].float()  # [kept, vocab]
    index = torch.from_numpy(rows).to(device)
    chosen = logits[index, torch.tensor(targets, device=device)] - logits.logsumexp(-1)[index]
    starts = np.cumsum([0, *(len(place) for place in places[:-1])])
    return [float(total) for total in np.add.reduceat(chosen.cpu().double().numpy(), starts)]


@dataclass(frozen=True)
class ChoiceScores:
    """What each question was answered, in the order of the questions.

    Attributes:
        log_likelihood (`list[bool]`): Whether the most likely option is the right one.
        normalized (`list[bool]`): The same by log-likelihood per character (the harness's `acc_norm`).
        pmi (`list[bool]`): Whether the option of highest PMI is the right one.
        removed (`list[bool]`): Whether the option that is likeliest after the bare prompt is the right one. A bank on
            which this is far from chance can be answered without its questions.
        scores (`list[list[float]]`): Log-likelihood of each option, in nats.
        bare (`list[list[float]]`): Log-likelihood of each option after the bare prompt, in nats.
    """

    log_likelihood: list[bool]
    normalized: list[bool]
    pmi: list[bool]
    removed: list[bool]
    scores: list[list[float]]
    bare: list[list[float]]


def score_choices(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    prompt: str = PROMPT,
    description: str = "Multiple choice",
    over_ranks: bool = False,
    sharing: Sharing | None = None,
) -> ChoiceScores:
    """Answer multiple-choice questions by ranking the options.

    An option's log-likelihood is the sum of its tokens' log-probabilities after the prompt, which has the question's
    own form. Its PMI is that minus the same sum after a bare `"Answer:"`, which removes the preference for frequent
    strings (for a turn of chat: after one in which nothing was asked). What several questions have in common, such as
    options after the bare prompt, is scored once.

    Args:
        questions: Questions, each with its options; the first option need not be the right one.
        batch_size: Questions per forward pass.
        prompt: What stands before an option of a question in the form `"question"`.
        over_ranks: See [`run_batches`].
        sharing: See [`log_likelihoods`].

    Raises:
        ValueError: if there are no questions.
    """
    if not questions:
        raise ValueError("`questions` is empty, so there is nothing to score: pass at least one Question.")
    parts = _parts(processing_class, questions, prompt)
    asked = [[(before, option) for option in options] for before, _, options in parts]
    alone = [[(bare, option) for option in options] for _, bare, options in parts]
    pairs = list(dict.fromkeys(pair for rows in (alone, asked) for row in rows for pair in row))
    found = log_likelihoods(
        model,
        processing_class,
        pairs,
        batch_size=_OPTIONS * batch_size,
        description=description,
        over_ranks=over_ranks,
        sharing=sharing,
    )
    likelihoods = dict(zip(pairs, found, strict=True))
    scores, bare = ([[likelihoods[pair] for pair in row] for row in rows] for rows in (asked, alone))
    normalized = [
        [score / len(option) for score, option in zip(row, question.options, strict=True)]
        for row, question in zip(scores, questions, strict=True)
    ]
    return ChoiceScores(
        log_likelihood=_verdicts(questions, scores),
        normalized=_verdicts(questions, normalized),
        pmi=_verdicts(questions, [pmi(*both) for both in zip(scores, bare, strict=True)]),
        removed=_verdicts(questions, bare),
        scores=scores,
        bare=bare,
    )


def _parts(
    processing_class: PreTrainedTokenizerBase, questions: Sequence[Question], prompt: str
) -> list[tuple[str, str, list[str]]]:
    """Of each question the prompt, the bare prompt, and the options with the space before them."""
    has_turns = text_tokenizer(processing_class).chat_template is not None
    parts = []
    for question in questions:
        if question.form == "chat" and has_turns:
            prompts = as_prompt(processing_class, question.text), as_prompt(processing_class, BARE_TURN)
            parts.append((*prompts, list(question.options)))
        else:
            before = question.text if question.form == "text" else prompt.format(question=question.text)
            parts.append((before, BARE_PROMPT, [f" {option}" for option in question.options]))
    return parts


def pmi(scores: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Pointwise mutual information, in nats, of a question with options of these log-likelihoods after it and after the bare prompt."""
    return [score - alone for score, alone in zip(scores, bare, strict=True)]


def likeliest(values: Sequence[float]) -> int:
    """Index of the largest value; the first of equals, as in the harness."""
    return max(range(len(values)), key=values.__getitem__)


def _verdicts(questions: Sequence[Question], values: Sequence[Sequence[float]]) -> list[bool]:
    return [
        question.options[likeliest(row)] == question.answer for question, row in zip(questions, values, strict=True)
    ]


def letter_prompt(question: Question) -> str:
    """The question with its options behind the letters A, B, C, …, in their order."""
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, question.options, strict=False)]
    return "\n".join([f"Question: {question.text}", *lines, "Answer:"])


def score_letters(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 16,
    over_ranks: bool = False,
) -> list[bool]:
    """Whether the likeliest letter after each question and its options is the right one.

    This is how MMLU and WMDP are asked. It needs the knowledge *and* the format: a model that merely lost the habit of
    answering by letter falls here, but not by PMI.

    Raises:
        ValueError: if there are no questions, or one has more options than there are letters.
    """
    if not questions:
        raise ValueError("`questions` is empty, so there is nothing to score: pass at least one Question.")
    for question in questions:
        if len(question.options) > len(ascii_uppercase):
            raise ValueError(f"Question {question.text!r} has {len(question.options)} options: letters end at 26.")
    pairs = [
        (letter_prompt(question), f" {letter}")
        for question in questions
        for letter in ascii_uppercase[: len(question.options)]
    ]
    most = max(len(question.options) for question in questions)
    found = iter(
        log_likelihoods(
            model,
            processing_class,
            pairs,
            batch_size=most * batch_size,
            description="Letter choice",
            over_ranks=over_ranks,
        )
    )
    return _verdicts(questions, [[next(found) for _ in question.options] for question in questions])


def read_by_judge(
    processing_class: PreTrainedTokenizerBase, questions: Sequence[str], answers: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Prompts and answers for [`reverse_perplexity`] under any judge, which is asked each question in its own chat template.

    The prompts that a model was given may hold special tokens that mean nothing to another judge, so it reads the bare
    question. The white space between prompt and answer is made what the judge expects there. Perplexities are per token
    of the judge: two models compare under one judge, but a model's values under two judges don't.

    Args:
        processing_class: The judge's own tokenizer.
        questions: Questions, without any template.
    """
    prompts = [as_prompt(processing_class, question) for question in questions]
    space = " " if text_tokenizer(processing_class).chat_template is None else ""
    return prompts, [space + answer.lstrip() if answer.strip() else "" for answer in answers]


@torch.no_grad()
def reverse_perplexity(
    judge: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    *,
    batch_size: int = 16,
    over_ranks: bool = False,
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood (sum, in nats) and length in tokens of each answer, given its prompt, under a judge.

    An empty answer counts as one end-of-text token. R-PPL is `exp(Σ nlls / Σ tokens)`.

    Args:
        processing_class: The judge's own tokenizer.
        prompts: Prompts in the form in which the judge is to read them; see [`read_by_judge`].
        over_ranks: See [`run_batches`].
    """
    collator = ElmDataCollator(processing_class)
    tokenizer = collator.processing_class
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for head, answer in zip(tokenize(tokenizer, prompts), answers, strict=True):
        # The judge reads the tokens that were generated after the prompt: tokenized apart, as they were made. An empty
        # answer is judged by the end-of-text token that is all it holds.
        tail = continuation_ids(tokenizer, answer) or end
        rows.append((head.ids + tail, len(head.ids)))

    def run(batch: list[tuple[list[int], int]]) -> list[float]:
        padded = send_to_device(collator.pad(batch), judge.device)
        return text_sums(token_losses(judge, padded), padded["rows"], len(batch)).tolist()

    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    with evaluating(judge):
        found = run_batches(run, batches, judge, over_ranks=over_ranks)
    return list(chain(*found)), [len(ids) - first for ids, first in rows]


def token_losses(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Negative log-likelihood of every label of a batch of [`ElmDataCollator`], `[positions]`."""
    logits = position_logits(model, batch)
    labels = batch["labels"][batch["rows"], batch["columns"] + 1]
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def position_logits(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at the positions of a batch that predict a label, `[positions, vocab]`."""
    mask = batch["attention_mask"]
    with keep_positions(model.get_output_embeddings(), batch["rows"] * mask.size(1) + batch["columns"]):
        return model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).logits[0]
