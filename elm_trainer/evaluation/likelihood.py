"""Log-likelihoods of many continuations, and inputs for generating them; what prompts begin with alike is run once."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.packing import PrefixTree, additive_mask, obeys_masks, sharing_rows
from ..data.tokens import common_prefix, tokenize_pairs
from ..modeling import evaluating
from ..ops import KeepPositions
from .pair import run_batches


Sharing: TypeAlias = Callable[[Hashable, Callable[[], torch.Tensor]], torch.Tensor]
# A separate forward pass for fewer tokens costs more than it saves.
_LEAST_SHARED = 4


@dataclass(frozen=True)
class _Sequence:
    """Tokens of a prompt with its continuation, and the index of the continuation's first token."""

    ids: list[int]
    first: int


def generation_inputs(
    model: PreTrainedModel | PeftModel, rows: Sequence[list[int]], pad_token_id: int, new_tokens: int
) -> dict[str, Any]:
    """What `generate` is to be called with for a batch of prompts.

    The tokens that all of them begin with are run once, and their keys and values repeated for every row. Padding then
    stands behind them, `[shared, padding, rest]`, masked and without a position; otherwise on the left.

    Args:
        model: Model, in evaluation mode.
        rows: Tokens of each prompt.
        pad_token_id: Token that stands where there is none.
        new_tokens: Tokens that will be generated at most.

    Returns:
        `dict`: `input_ids` and `attention_mask`, `[rows, width]`, and where something is shared `past_key_values`.
    """
    width = max(len(row) for row in rows)
    # What the first and the last in order have in common, all between them have; each keeps one token or more.
    shared = min(common_prefix(min(rows), max(rows)), min(map(len, rows)) - 1) if len(rows) > 1 else 0
    if shared < _LEAST_SHARED or not obeys_masks(model, width + new_tokens):
        shared = 0
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        rest = width - len(row) + shared
        input_ids[index, :shared], input_ids[index, rest:] = torch.tensor(row[:shared]), torch.tensor(row[shared:])
        mask[index, :shared] = mask[index, rest:] = 1
    inputs: dict[str, Any] = {"input_ids": input_ids.to(model.device), "attention_mask": mask.to(model.device)}
    if shared:
        cache = model(input_ids=inputs["input_ids"][:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rows))
        inputs["past_key_values"] = cache
    return inputs


@torch.no_grad()
def read_prompts(
    model: PreTrainedModel | PeftModel, rows: Sequence[list[int]], new_tokens: int
) -> tuple[torch.Tensor, Any, torch.Tensor]:
    """Run a batch of prompts, those that are there several times once, and what all of them begin with once.

    Args:
        model: Model, in evaluation mode.
        rows: Tokens of each prompt.
        new_tokens: Tokens that will be generated at most.

    Returns:
        `tuple[torch.Tensor, Cache, torch.Tensor]`: the logits behind each prompt, `[rows, vocab]`, the cache, and its mask, `[rows,
        width]`, whose sum is the position of the next token.
    """
    distinct = sorted(set(map(tuple, rows)))
    inputs = generation_inputs(model, [list(row) for row in distinct], 0, new_tokens)
    mask, cache = inputs["attention_mask"], inputs.get("past_key_values")
    shared = cache.get_seq_length() if cache is not None else 0
    output = model(
        input_ids=inputs["input_ids"][:, shared:],
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, shared:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    places = {row: place for place, row in enumerate(distinct)}
    whose = torch.tensor([places[tuple(row)] for row in rows], device=model.device)
    output.past_key_values.batch_select_indices(whose)
    return output.logits[whose, -1], output.past_key_values, mask[whose]


@contextmanager
def generating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """While this holds, `generate` uses the settings it is given alone, none of the model's own (penalties, beams, a minimum
    length, a cache), and works under FSDP, whose weights outside the layers only `forward` would gather.

    What the head reads is made contiguous: torch would multiply a slice of the states row by row with a head that needs
    no gradient, and copy its weights for every row.
    """
    head = model.get_output_embeddings()
    # PEFT keeps the settings beside the base's, and hands them over.
    parts = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    owned = [(part, part.generation_config) for part in parts if "generation_config" in vars(part)]
    for part, _ in owned:
        part.generation_config = GenerationConfig()
    handle = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    sharded = isinstance(model, FSDPModule)
    if sharded:
        register_fsdp_forward_method(model, "generate")
    try:
        yield
    finally:
        for part, settings in owned:
            part.generation_config = settings
        handle.remove()
        if sharded:
            del model.generate  # the instance's; the method of the class is left


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
        model: Model; put in evaluation mode for the call, then back.
        pairs: Prompts and their continuations, with the space between them.
        batch_size: Most pairs in a forward pass.
        description: Label of the progress bar.
        over_ranks: Whether the processes of a launch share the work; then all of them must call this.
        sharing: Runs a forward, given what tells its inputs from others; see [`SharedLayers.run`].

    Raises:
        ValueError: if a prompt or a continuation has no token.
    """
    sequences = _tokenize(processing_class, pairs)
    packed = obeys_masks(model, max((len(sequence.ids) for sequence in sequences), default=0))
    # What begins alike shares a pack, what is of one length shares a padded batch.
    batches = sharing_rows([sequence.ids[:-1] for sequence in sequences], batch_size, tuple if packed else len)

    def run(batch: list[int]) -> list[float]:
        members = [sequences[index] for index in batch]
        return (_packed_sums if packed else _padded_sums)(model, members, sharing)

    with evaluating(model):
        found = run_batches(run, batches, model, over_ranks=over_ranks, description=description)
    totals = dict(zip(chain(*batches), chain(*found), strict=True))
    return [totals[index] for index in range(len(sequences))]


def _tokenize(processing_class: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[_Sequence]:
    sequences = []
    for (prompt, continuation), (ids, first) in zip(pairs, tokenize_pairs(processing_class, pairs), strict=True):
        if not 0 < first < len(ids):
            raise ValueError(
                f"Prompt {prompt!r} with continuation {continuation!r} leaves nothing to predict: neither may be empty."
            )
        sequences.append(_Sequence(ids, first))
    return sequences


def _packed_sums(
    model: PreTrainedModel | PeftModel, sequences: Sequence[_Sequence], sharing: Sharing | None
) -> list[float]:
    """Sums over sequences sorted by their tokens, which are laid out as a tree in one row."""
    # Nothing is predicted from the last token.
    tree = PrefixTree.of([sequence.ids[:-1] for sequence in sequences])
    places = [path[sequence.first - 1 :] for sequence, path in zip(sequences, tree.paths, strict=True)]
    batch = {
        "input_ids": torch.tensor([tree.tokens]),
        "position_ids": torch.tensor([tree.depths]),
        "attention_mask": additive_mask(tree.seen(), model.get_input_embeddings().weight.dtype)[None, None],
    }
    return _sums(model, batch, sequences, places, sharing)


def _padded_sums(
    model: PreTrainedModel | PeftModel, sequences: Sequence[_Sequence], sharing: Sharing | None
) -> list[float]:
    """Sums over sequences in rows of their own, padded on the right, where no causal model sees it."""
    width = max(len(sequence.ids) for sequence in sequences) - 1
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.ids) - 1] = torch.tensor(sequence.ids[:-1])
        mask[row, : len(sequence.ids) - 1] = 1
    places = [
        [row * width + column for column in range(sequence.first - 1, len(sequence.ids) - 1)]
        for row, sequence in enumerate(sequences)
    ]
    return _sums(model, {"input_ids": input_ids, "attention_mask": mask}, sequences, places, sharing)


@torch.no_grad()
def _sums(
    model: PreTrainedModel | PeftModel,
    inputs: dict[str, torch.Tensor],
    sequences: Sequence[_Sequence],
    places: Sequence[Sequence[int]],
    sharing: Sharing | None,
) -> list[float]:
    """One forward pass; `places` are the flat positions that predict the tokens of each continuation."""
    device = model.device
    kept, rows = np.unique(np.concatenate(places), return_inverse=True)
    targets = [token for sequence in sequences for token in sequence.ids[sequence.first :]]

    def forward() -> torch.Tensor:
        return model(**{name: tensor.to(device) for name, tensor in inputs.items()}, use_cache=False).logits

    with KeepPositions(model.get_output_embeddings(), torch.from_numpy(kept).to(device)):
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
