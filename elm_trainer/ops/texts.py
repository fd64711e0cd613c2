"""Sums and means over texts of values per position."""

import torch


def text_mean(values: torch.Tensor, text: torch.Tensor, texts: int) -> torch.Tensor:
    """Mean over texts of the mean over each text's positions; a text without positions counts as 0.

    Unlike a mean over tokens it does not depend on how texts are split over batches, accumulation steps or processes.

    Args:
        values (`torch.Tensor`): One value per position, `[positions]`.
        text (`torch.Tensor`): Which text each position belongs to, `[positions]`.
        texts (`int`): Number of texts.
    """
    return text_means(values, text, texts).mean()


def text_means(values: torch.Tensor, text: torch.Tensor, texts: int) -> torch.Tensor:
    """Mean over each text's positions, `[texts]`; 0 for a text without positions. Arguments as of [`text_mean`]."""
    return text_sums(values, text, texts) / _positions_per_text(values, text, texts)


def text_sums(values: torch.Tensor, text: torch.Tensor, texts: int) -> torch.Tensor:
    """Sum over each text's positions, `[texts]`. Arguments as of [`text_mean`]."""
    return values.new_zeros(texts).index_add(0, text, values)


def position_weights(values: torch.Tensor, text: torch.Tensor, texts: int, share: float) -> torch.Tensor:
    """Weights of the positions in the erase term.

    Args:
        values (`torch.Tensor`): [`disagreement`] of expert and novice, `[positions]`.
        text (`torch.Tensor`): Which text each position belongs to, `[positions]`.
        texts (`int`): Number of texts.
        share (`float`): Share of a text's weight that is spread in proportion to `values`; the rest is spread evenly.

    Returns:
        `torch.Tensor`: weights `[positions]` whose mean over each text is 1.
    """
    return (1 - share) + share * values / text_means(values, text, texts)[text]


def _positions_per_text(values: torch.Tensor, text: torch.Tensor, texts: int) -> torch.Tensor:
    return text_sums(torch.ones_like(values), text, texts).clamp(min=1)
