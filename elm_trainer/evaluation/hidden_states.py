"""Hidden states of every layer: their norms, and what the model's head reads in them (logit lens)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import Question
from ..data.tokens import text_ids, tokenize, tokenize_pairs
from .multiple_choice import PROMPT, likeliest
from .pair import SIDES, ModelPair
from .statistics import Figure, bootstrap_ratio


Positions: TypeAlias = Literal["last", "all"]


@dataclass(frozen=True)
class ActivationNorms:
    """Mean L2 norm per token of each layer's hidden states, the embeddings first, and erased over reference."""

    reference: list[Figure]
    erased: list[Figure]
    ratio: list[Figure]


def hidden_states(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    positions: Positions = "last",
    max_length: int | None = None,
    batch_size: int = 16,
) -> list[torch.Tensor]:
    """Hidden states of every layer, without running the head.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Model, already in evaluation mode.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        texts (`Sequence[str]`):
            Texts to read.
        positions (`str`, *optional*, defaults to `"last"`):
            `"last"` for the last token of each text, `"all"` for all of its tokens.
        max_length (`int`, *optional*):
            Tokens of a text that are read; all of them by default.
        batch_size (`int`, *optional*, defaults to `16`):
            Texts per forward pass.

    Returns:
        `list[torch.Tensor]`: for each text `[layers + 1, tokens, hidden]`, in float32 on the CPU. The first entry is
        the embeddings' output, entry `i` that of layer `i`. Unlike in transformers' `hidden_states` the last entry
        too stands *before* the model's final norm, so that it can be set beside the others.

    Raises:
        ValueError: if there are no texts, one holds no token, or the model's decoder or final norm cannot be found.
    """
    found: dict[int, torch.Tensor] = {}
    for index, states in _states_by_text(model, processing_class, texts, positions, max_length, batch_size):
        found[index] = states
    return [found[index] for index in range(len(texts))]


def activation_norms(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    batch_size: int = 16,
    seed: int = 0,
) -> ActivationNorms:
    """How large the hidden states of both models are on the same texts, layer by layer.

    A text's first token is left out: models park attention on it and give it a norm that can be a hundred times that
    of the others, so that it alone would make the mean.

    Args:
        pair ([`ModelPair`]): The erased model and its reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.
        texts (`Sequence[str]`): Texts to read, of two tokens or more.
        max_length (`int`, *optional*, defaults to `64`): Tokens of a text that are read.
        batch_size (`int`, *optional*, defaults to `16`): Texts per forward pass.
        seed (`int`, *optional*, defaults to `0`): Seed of the intervals.

    Returns:
        [`ActivationNorms`]: one figure per layer, with the interval over resampled texts; the ratio's resamples hold
        the same texts on both sides.
    """
    tokens = [0] * len(texts)
    sums: dict[str, list[list[float]]] = {}
    for side in SIDES:
        sums[side] = [[] for _ in texts]
        with pair.use(side) as model:
            for index, states in _states_by_text(model, processing_class, texts, "all", max_length, batch_size):
                norms = states[:, 1:].norm(dim=-1)  # [layers + 1, tokens - 1]
                sums[side][index] = norms.sum(-1).tolist()
                tokens[index] = norms.size(1)
    reference, erased = (list(zip(*sums[side], strict=True)) for side in SIDES)
    return ActivationNorms(
        [bootstrap_ratio(layer, tokens, seed=seed) for layer in reference],
        [bootstrap_ratio(layer, tokens, seed=seed) for layer in erased],
        [bootstrap_ratio(*layers, seed=seed) for layers in zip(erased, reference, strict=True)],
    )


def decoder_of(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The model without its head, its adapter in place.

    Raises:
        ValueError: if the adapter is a learned prompt, which stands outside the decoder, or there is no decoder apart
            from the head.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"The adapter {model.active_adapter!r} is a {model.active_peft_config.peft_type.value}, a learned prompt "
            "without weights in the layers: look inside an adapter that changes the layers, such as LoRA."
        )
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder()
    if decoder is base:
        raise ValueError(
            f"{type(base).__name__} has no decoder apart from its head: pass a causal language model that transformers "
            "has a class for."
        )
    return decoder


@torch.inference_mode()
def final_norm(model: PreTrainedModel | PeftModel) -> nn.Module:
    """The norm between the last layer and the head: the child of the decoder whose output is the decoder's own.

    Names and places of it differ between model classes, so it is found by running a few tokens.

    Raises:
        ValueError: if no child's output is the decoder's.
    """
    decoder = decoder_of(model)
    outputs: list[tuple[nn.Module, object]] = []
    handles = [
        child.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
        for child in decoder.children()
    ]
    # Several tokens: the embedding of one of them may be all zeros, and then every output is.
    input_ids = torch.arange(min(8, model.config.get_text_config().vocab_size), device=model.device)[None]
    try:
        last = decoder(input_ids=input_ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    for module, output in outputs:
        if (
            isinstance(output, torch.Tensor)
            and output.shape == last.shape
            and torch.equal(output.to(last.device), last)
        ):
            return module
    raise ValueError(
        f"The final norm of {type(decoder).__name__} cannot be found: none of its parts "
        f"{[name for name, _ in decoder.named_children()]} gives the output of the whole. Use a model with a norm "
        "between its last layer and its head."
    )


@torch.inference_mode()
def _states_by_text(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    positions: Positions,
    max_length: int | None,
    batch_size: int,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Index and hidden states of one text after the other, so that those of all texts need not be held at once."""
    if not texts:
        raise ValueError("`texts` is empty, so there is nothing to read: pass at least one text.")
    ids = [text.ids[:max_length] for text in tokenize(processing_class, texts)]
    if empty := [text for text, tokens in zip(texts, ids, strict=True) if not tokens]:
        raise ValueError(f"`texts` holds {empty[0]!r}, which has no token: leave it out.")
    # Texts of like length share a batch, so that little of it is padding.
    order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
    norm = final_norm(model)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        # Padding on the right needs no positions, which some decoders do not take, and no pad token: it is masked.
        input_ids = pad_sequence([torch.tensor(ids[index]) for index in batch], batch_first=True)  # [batch, seq]
        mask = pad_sequence([torch.ones(len(ids[index]), dtype=torch.long) for index in batch], batch_first=True)
        layers = _run_decoder(model, norm, input_ids, mask)
        lengths = mask.sum(-1)
        places = mask.flatten().nonzero()[:, 0]  # [tokens]
        if positions == "last":
            places, lengths = places[lengths.cumsum(0) - 1], torch.ones_like(lengths)
        # Chosen positions are gathered before anything is copied, in the model's own precision.
        chosen = [layer.flatten(0, 1)[places.to(layer.device)].to(model.device) for layer in layers]
        states = torch.stack(chosen).cpu().float()  # [layers + 1, tokens, hidden]
        yield from zip(batch, states.split(lengths.tolist(), dim=1), strict=True)


def _run_decoder(
    model: PreTrainedModel | PeftModel, norm: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> list[torch.Tensor]:
    """Embeddings' output and every layer's, each `[batch, seq, hidden]`; the last as the final norm receives it."""
    received: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, args: received.append(args[0]))
    try:
        outputs = decoder_of(model)(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            output_hidden_states=True,
            use_cache=False,
        )
    finally:
        handle.remove()
    return [*outputs.hidden_states[:-1], *received]


@dataclass(frozen=True)
class LensScores:
    """What each layer would answer.

    Attributes:
        accuracy (`list[Figure]`): Share of questions whose right option ranks first, per layer, the embeddings first;
            the interval is over resampled subjects, and their number is its `n`.
        logits (`list[list[list[float]]]`): Logit of each option's first token, by layer and kept question.
        questions (`list[int]`): Indices of the questions that were kept.
        chance (`float`): Accuracy of a guess among the options.
    """

    accuracy: list[Figure]
    logits: list[list[list[float]]]
    questions: list[int]
    chance: float


def logit_lens(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    prompt: str = PROMPT,
    batch_size: int = 16,
    seed: int = 0,
) -> LensScores:
    """Rank the options by their first token, under the final norm and head applied to every layer's hidden state.

    The state is that of the prompt's last token. A question is skipped where two options begin with the same token.
    The logits are those of the head alone: a model's own scaling or capping of them is left out, which changes no
    ranking.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`):
            Model, already in evaluation mode.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`Sequence[Question]`):
            Questions with their options.
        prompt (`str`, *optional*, defaults to `"Question: {question}\\nAnswer:"`):
            What stands before an option.
        batch_size (`int`, *optional*, defaults to `16`):
            Questions per forward pass.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the intervals.

    Returns:
        [`LensScores`]: verdicts of every layer; the last layer's are the model's own.

    Raises:
        ValueError: if no question is left, or the model's final norm or head cannot be found.
    """
    firsts = [_first_tokens(processing_class, prompt, question) for question in questions]
    kept = [index for index, tokens in enumerate(firsts) if tokens]
    if not kept:
        raise ValueError(
            f"None of the {len(questions)} `questions` has options that begin with different tokens: ask questions "
            "whose options differ in their first word."
        )
    prompts = [prompt.format(question=questions[index].text) for index in kept]
    states = torch.cat(hidden_states(model, processing_class, prompts, batch_size=batch_size), dim=1)
    logits = _option_logits(model, states, [firsts[index] for index in kept], batch_size)
    subjects: dict[str, int] = {}
    for index in kept:
        subjects.setdefault(questions[index].subject or questions[index].text, len(subjects))
    groups = torch.tensor([subjects[questions[index].subject or questions[index].text] for index in kept])
    accuracy = []
    for layer in logits:
        best = [questions[index].options[likeliest(scores)] for index, scores in zip(kept, layer, strict=True)]
        right = torch.tensor([option == questions[index].answer for index, option in zip(kept, best, strict=True)])
        # Several phrasings of one fact are no independent questions.
        accuracy.append(
            bootstrap_ratio(groups.bincount(right.double()).tolist(), groups.bincount().tolist(), seed=seed)
        )
    return LensScores(accuracy, logits, kept, sum(1 / len(questions[index].options) for index in kept) / len(kept))


def _first_tokens(processing_class: PreTrainedTokenizerBase, prompt: str, question: Question) -> list[int]:
    """First token of each option after the prompt; none where two are the same, or the prompt's tokens change."""
    head = prompt.format(question=question.text)
    head_ids = text_ids(processing_class, head)
    tokens = []
    for ids, first in tokenize_pairs(processing_class, [(head, f" {option}") for option in question.options]):
        if ids[:first] != head_ids:
            return []
        tokens.append(ids[first])
    return tokens if len(set(tokens)) == len(tokens) else []


@torch.inference_mode()
def _option_logits(
    model: PreTrainedModel | PeftModel, states: torch.Tensor, options: list[list[int]], batch_size: int
) -> list[list[list[float]]]:
    norm, head = final_norm(model), model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: pass a causal language model.")
    scores: list[list[list[float]]] = []
    for layer in states:  # [questions, hidden]
        rows: list[list[float]] = []
        for start in range(0, len(layer), batch_size):
            # Back into the model's own precision, from which the states came.
            batch = layer[start : start + batch_size, None].to(model.device, head.weight.dtype)
            logits = head(norm(batch))[:, 0].float()  # [batch, vocab]
            chosen = zip(logits, options[start : start + batch_size], strict=True)
            rows += [row[torch.tensor(tokens, device=row.device)].tolist() for row, tokens in chosen]
        scores.append(rows)
    return scores
