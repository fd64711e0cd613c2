"""Texts packed into rows without padding: which text lies where, planned on the host from lengths alone or from shared beginnings."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from heapq import heapreplace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from ..head import without_gradients
from ..modeling import evaluating
from .tokens import common_prefix


# Numbers of rows that are tried. Bounds rule out the others: up to 96 texts the best of all was always found, and with 384
# one that costs up to .1 % more.
_TRIED = 32
# Distinct tokens of a row in which texts share what they begin with: of several rows in a forward, those of 256 take .8 of the time of
# as many tokens in rows of 512 (SmolLM2-135M on two cores). And the largest share of all tokens that is worth a mask.
_SHARING_ROW, _SHARED = 256, 0.9
# A row attends over itself, so beyond some length more tokens cost more than what they share saves: on two cores
# SmolLM2-135M takes 1.6 ms a token in rows of 256, 1.7 in rows of 512 and 3.1 in rows of 1024.
MOST_SHARING = 512


@dataclass(frozen=True)
class PackingRule:
    """What decides how texts are packed, beside their lengths."""

    left_padded: bool  # whether sub-batches are padded on the left
    attention: float = math.inf  # tokens of a row at which attention costs as much as the matrices
    one_row: bool = False  # one row for all texts, as flash attention needs it
    apart: bool = False  # one text to a row, for models that carry a state along a row
    pad_to_multiple_of: int | None = None  # what the width of the rows is to be a multiple of


@dataclass(frozen=True)
class Packing:
    """How the rows of padded sub-batches lie in packed rows."""

    tokens: torch.Tensor  # for each packed slot, its token's index in the flattened sub-batches, `[rows, width]`
    # Positions that start anew at each text, `[rows, width]`; none where each has a row to itself, so that the model
    # counts in its own way.
    position_ids: torch.Tensor | None
    slots: torch.Tensor  # for each index in the flattened sub-batches, its packed slot, `[tokens]`; 0 for padding
    source: tuple[Any, ...]  # what it was made from: the rule, and width and lengths of each sub-batch
    # Where texts begin and end in the one row of flash attention, `[texts + 1]`, in int32, the gap at its end as one
    # more text; none where there are more rows.
    ends: torch.Tensor | None = None
    longest: int | None = None  # tokens of the longest of these
    # Which slots of its row each slot sees, bool `[rows, width, width]`, where texts share what they begin with;
    # otherwise the model keeps texts apart by their positions.
    seen: torch.Tensor | None = None

    def attention_arguments(self, model: nn.Module) -> dict[str, Any]:
        """What flash attention of variable lengths takes, as `FlashAttentionKwargs` of transformers names it, or a mask.

        Made on the host, where lengths are known. Without it transformers looks for them in `position_ids`, for which the
        host waits for the device in every layer. The model's embeddings say of which data type a mask is.
        """
        if self.seen is not None:
            embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
            return {"attention_mask": additive_mask(self.seen, embeddings.weight.dtype)[:, None]}
        if self.ends is None:
            return {}
        return {
            "cu_seq_lens_q": self.ends,
            "cu_seq_lens_k": self.ends,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packing":
        """The same on a device; `accelerate` calls it for what a collator gives."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Packing":
        """The same in pinned memory; PyTorch's `DataLoader` calls it."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Any) -> "Packing":
        names = [name for name, part in vars(self).items() if isinstance(part, torch.Tensor)]
        return replace(self, **{name: change(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class PackingPlan:
    """What a collator packs, so that the training step need not.

    Args:
        rule ([`PackingRule`]): How.
        groups (`Sequence[Sequence[str]]`): Names of the sub-batches that share a forward; those that a batch lacks are left
            out. `"forget.expert"` is the part `expert` of `forget`.
    """

    rule: PackingRule
    groups: Sequence[Sequence[str]]

    def add(self, batch: Mapping[str, Any]) -> None:
        """Put the packing of each group into its first sub-batch, as `packings`."""
        for parts in self._parts(batch):
            parts[0].setdefault("packings", []).append(pack_batches(parts, self.rule))

    def share(self, batch: Mapping[str, Any], model: nn.Module) -> None:
        """The same by [`share_beginnings`], of a batch on the CPU, where the model allows it and a tenth is spared."""
        for parts in self._parts(batch):
            lengths = [length for part in parts for length in part["lengths"]]
            if not self.rule.apart and obeys_masks(model, max(lengths)):
                packing = share_beginnings(parts, self.rule)
                if packing.tokens.numel() <= _SHARED * sum(lengths):
                    parts[0].setdefault("packings", []).append(packing)

    def _parts(self, batch: Mapping[str, Any]) -> Iterator[list[Any]]:
        """The sub-batches of each group that the batch has some of."""
        for group in self.groups:
            found = (reduce(lambda part, key: part.get(key, {}), name.split("."), batch) for name in group)
            if parts := [part for part in found if part]:
                yield parts


def find_packing(batches: Sequence[Mapping[str, Any]], rule: PackingRule) -> Packing:
    """The packing of sub-batches that the collator has made by this rule, or else one that is made here."""
    wanted = _source(batches, rule)
    made = next((packing for packing in batches[0].get("packings", ()) if packing.source == wanted), None)
    return made or pack_batches(batches, rule)


def _source(batches: Sequence[Mapping[str, Any]], rule: PackingRule) -> tuple[Any, ...]:
    return (rule, *((batch["input_ids"].size(1), *batch["lengths"]) for batch in batches))


def pack(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Spread texts of these lengths over rows: the longest first, each into the row that holds least."""
    filled, texts = [(0, row) for row in range(rows)], [[] for _ in range(rows)]  # type: ignore[var-annotated]
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        held, row = filled[0]
        texts[row].append(text)
        heapreplace(filled, (held + lengths[text], row))
    return texts


def best_rows(lengths: Sequence[int], attention: float) -> list[list[int]]:
    """Spread texts over as many rows as cost least: few and long ones leave no gaps, but every token attends to its row,
    which costs as much as the matrices where a row has `attention` tokens.

    Only numbers of rows whose least possible cost is below the best that was found are tried, the most promising first and
    32 at most; so the time grows with `n·log n` of `n` texts.
    """
    count, total = len(lengths), sum(lengths)
    ordered = sorted(lengths, reverse=True)
    sums = [0, *accumulate(ordered)]
    longest = sums[1]

    def cost(rows: int, width: int) -> float:
        return rows * width * (1 + width / attention)

    def least_width(rows: int) -> int:
        # Of the k·rows + 1 longest texts, k + 1 share a row.
        shared = (sums[k * rows + 1] - sums[k * rows - k] for k in range(1, (count - 1) // rows + 1))
        return max(-(-total // rows), longest, *shared)

    # More rows than keep the longest text alone in its row would only be emptier.
    most = min(count, -(-2 * total // longest))
    bounds = sorted((cost(rows, least_width(rows)), rows) for rows in range(1, most + 1))
    best = (math.inf, 1)
    for bound, rows in bounds[:_TRIED]:
        if bound > best[0]:
            break
        held = [0] * rows
        for length in ordered:
            heapreplace(held, held[0] + length)
        best = min(best, (cost(rows, max(held)), rows))
    return pack(lengths, best[1])


def _texts(batches: Sequence[Mapping[str, Any]], rule: PackingRule) -> tuple[list[int], list[int], int]:
    """Where each text begins in the flattened sub-batches, how long it is, and the tokens of all, padding included."""
    starts: list[int] = []
    lengths: list[int] = []
    total = 0
    for batch in batches:
        seq = batch["input_ids"].size(1)
        for length in batch["lengths"]:
            starts.append(total + (seq - length if rule.left_padded else 0))
            lengths.append(length)
            total += seq
    return starts, lengths, total


def _width(filled: Sequence[int], rule: PackingRule) -> int:
    """The width of rows of which each holds so many tokens."""
    multiple = rule.pad_to_multiple_of or 1
    return -(-max(filled) // multiple) * multiple


def pack_batches(batches: Sequence[Mapping[str, Any]], rule: PackingRule) -> Packing:
    """Plan the packed rows for sub-batches of [`ElmDataCollator`]; made on the CPU, from lengths alone."""
    starts, lengths, total = _texts(batches, rule)
    if rule.apart:
        rows = [[text] for text in range(len(lengths))]
    else:
        rows = pack(lengths, 1) if rule.one_row else best_rows(lengths, rule.attention)
    filled = [sum(lengths[text] for text in row) for row in rows]
    width = _width(filled, rule)
    order = [text for row in rows for text in row]
    # Where each text begins in the flattened packed rows, and where in the flattened sub-batches.
    places = [
        index * width + place
        for index, row in enumerate(rows)
        for place in accumulate((lengths[text] for text in row[:-1]), initial=0)
    ]
    spans = torch.tensor([lengths[text] for text in order])
    within = torch.arange(int(spans.sum())) - (spans.cumsum(0) - spans).repeat_interleave(spans)
    taken = torch.tensor([starts[text] for text in order]).repeat_interleave(spans) + within
    given = torch.tensor(places).repeat_interleave(spans) + within
    tokens = torch.zeros(len(rows) * width, dtype=torch.long)
    slots = torch.zeros(total, dtype=torch.long)
    tokens[given], slots[taken] = taken, given
    # A gap at the end of a row counts as one more text, whose logits nobody reads.
    position_ids = torch.arange(width) - torch.tensor(filled)[:, None]
    position_ids.view(-1)[given] = within
    places_given = None if rule.apart else position_ids
    packing = Packing(tokens.view(len(rows), width), places_given, slots, _source(batches, rule))
    if rule.apart or not rule.one_row:
        return packing
    ends = [*places, filled[0]] + [width] * (width > filled[0])
    longest = max(end - start for start, end in pairwise(ends))
    return replace(packing, ends=torch.tensor(ends, dtype=torch.int32), longest=longest)


def share_beginnings(batches: Sequence[Mapping[str, Any]], rule: PackingRule) -> Packing:
    """Plan packed rows in which texts share what they begin with, such as a chat template or a sentence up to a name.

    For forwards without gradients of models that [`obeys_masks`] allows. A token sees its own text alone, so each gives what it
    gives in a row of its own.
    """
    starts, lengths, total = _texts(batches, rule)
    given = [token for batch in batches for token in batch["input_ids"].flatten().tolist()]
    texts = [given[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    rows = sharing_rows(texts, width=max(_SHARING_ROW, *map(len, texts)))
    trees = [PrefixTree.of([texts[text] for text in row]) for row in rows]
    width = _width([len(tree.tokens) for tree in trees], rule)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    position_ids, slots = torch.zeros_like(tokens), torch.zeros(total, dtype=torch.long)
    for number, (row, tree) in enumerate(zip(rows, trees, strict=True)):
        position_ids[number, : len(tree.depths)] = torch.tensor(tree.depths)
        for text, path in zip(row, tree.paths, strict=True):
            places, taken = torch.tensor(path), torch.arange(starts[text], starts[text] + len(path))
            tokens[number, places] = taken
            slots[taken] = number * width + places
    seen = torch.stack([tree.seen(width) for tree in trees])
    return Packing(tokens, position_ids, slots, _source(batches, rule), seen=seen)


@dataclass(frozen=True)
class PrefixTree:
    """Texts as branches of trees, in which each distinct beginning has one token."""

    tokens: list[int]  # token ids
    depths: list[int]  # how many tokens stand before each in its text
    parents: list[int]  # index of the token before each, -1 for the first of a text
    paths: list[list[int]]  # for each text, the indices of its tokens

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]]) -> "PrefixTree":
        """The trees of texts `[token ids]` that are sorted, so that those which begin alike follow one another."""
        tree = cls([], [], [], [])
        before: Sequence[int] = []
        path: list[int] = []
        for ids in texts:
            path = path[: common_prefix(before, ids)]
            for depth in range(len(path), len(ids)):
                tree.parents.append(path[-1] if path else -1)
                path.append(len(tree.tokens))
                tree.tokens.append(ids[depth])
                tree.depths.append(depth)
            tree.paths.append(list(path))
            before = ids
        return tree

    def seen(self, width: int | None = None) -> torch.Tensor:
        """Which tokens each token sees, itself among them: bool `[width, width]`, where what is behind the tree sees itself alone."""
        sees: np.ndarray = np.eye(width or len(self.tokens), dtype=bool)
        for token, parent in enumerate(self.parents):
            if parent >= 0:
                sees[token] |= sees[parent]
        return torch.from_numpy(sees)


def additive_mask(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the scores of attention: 0 where a token is seen, else the least number of the data type."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def sharing_rows(
    texts: Sequence[Sequence[int]],
    most: int | None = None,
    key: Callable[[Sequence[int]], Any] = tuple,
    width: int = MOST_SHARING,
) -> list[list[int]]:
    """Indices of texts, given as token ids, in rows, those that are next to each other in order together: `most` texts and `width` tokens
    at most, beginnings that a text has in common with the one before counted once; a longer text has a row to itself.

    They are put in order by a `key`: by their tokens, so that those that begin alike are together, or by `len`.
    """
    order = sorted(range(len(texts)), key=lambda index: key(texts[index]))
    rows: list[list[int]] = []
    tokens = 0
    for index in order:
        ids = texts[index]
        added = len(ids) - (common_prefix(texts[rows[-1][-1]], ids) if rows else 0)
        if not rows or len(rows[-1]) == most or tokens + added > width:
            rows.append([])
            tokens, added = 0, len(ids)
        rows[-1].append(index)
        tokens += added
    return rows


def obeys_masks(model: nn.Module, longest: int) -> bool:
    """Whether a causal model, adapted or not, takes a mask `[rows, 1, tokens, tokens]` and positions of our choice, and obeys them
    for texts of at most `longest` tokens.
    """
    # A learned prompt stands before the tokens, and takes no positions of ours.
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return (
        type(base).__module__.startswith("transformers.models.")
        and not base._is_stateful
        and "position_ids" in inspect.signature(base.forward).parameters
        and not getattr(config, "alibi", False)
        and config._attn_implementation in ("eager", "sdpa")
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
        # GPT-Neo's local layers count the window along the row, whatever the mask says.
        and not getattr(config, "window_size", None)
        and (window is None or longest <= window)
    )


def texts_interact(model: nn.Module, first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether two texts, given as equally many token ids, change each other's logits in one row, although their positions start anew.

    Many architectures keep such texts apart by a mask made from the positions. Others take no notice of positions (biases by
    distance, learned positions counted from the mask) or carry a state or a convolution along the row, and do not say so. The model
    is run three times, in evaluation mode.
    """
    device = next(model.parameters()).device
    pair = torch.tensor([list(first), list(second)], device=device)
    anew = torch.arange(len(first), device=device).repeat(2)[None]
    with evaluating(model), without_gradients():
        alone, rows, packed = (
            model(input_ids=tokens, use_cache=False, **places).logits[-1, -len(first) :].float()
            for tokens, places in ((pair[1:], {}), (pair, {}), (pair.view(1, -1), {"position_ids": anew}))
        )
    # Rounding differs with the shape of a batch too, by how much depends on the precision and the device.
    rounding = (rows - alone).abs().max()
    return bool((packed - alone).abs().max() > 8 * rounding + 2e-5 * alone.abs().max())
