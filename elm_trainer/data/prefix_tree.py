"""Texts that share what they begin with: laid into one row as the branches of trees, in which a token sees its own branch alone."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from .tokens import common_prefix


# A row attends over itself, so beyond some length more tokens cost more than what they share saves: on two cores
# SmolLM2-135M takes 1.6 ms a token in rows of 256, 1.7 in rows of 512 and 3.1 in rows of 1024.
MOST_SHARING = 512


@dataclass(frozen=True)
class PrefixTree:
    """Texts as branches of trees, in which each distinct beginning has one token.

    Attributes:
        tokens (`list[int]`): Token ids.
        depths (`list[int]`): How many tokens stand before each in its text.
        parents (`list[int]`): Index of the token before each, -1 for the first of a text.
        paths (`list[list[int]]`): For each text, the indices of its tokens.
    """

    tokens: list[int]
    depths: list[int]
    parents: list[int]
    paths: list[list[int]]

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
    """Indices of texts in rows, those that are next to each other in order together.

    Args:
        texts (`Sequence[Sequence[int]]`): Token ids of each.
        most (`int`, *optional*): Texts of a row at most.
        key (`Callable`, *optional*, defaults to `tuple`): By what they are put in order: by their tokens, so that those that begin alike
            are together, or by `len`.
        width (`int`, *optional*, defaults to `512`): Tokens of a row at most, beginnings that a text has in common with the one before
            counted once; a longer text has a row to itself.
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
    """Whether a model takes a mask `[rows, 1, tokens, tokens]` and positions of our choice, and obeys them.

    Args:
        model (`nn.Module`): Causal language model, or its adapted one.
        longest (`int`): Tokens of the longest text.
    """
    # A learned prompt stands before the tokens, and takes no positions of ours.
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    if not type(base).__module__.startswith("transformers.models.") or base._is_stateful:
        return False
    if "position_ids" not in inspect.signature(base.forward).parameters or getattr(config, "alibi", False):
        return False
    if config._attn_implementation not in ("eager", "sdpa"):
        return False
    if not set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}:
        return False
    # GPT-Neo's local layers count the window along the row, whatever the mask says.
    if getattr(config, "window_size", None):
        return False
    window = getattr(config, "sliding_window", None)
    return window is None or longest <= window
