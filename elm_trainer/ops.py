"""The tensor kernels of the objectives, as pure functions named after the equations of DESIGN §5 and §8."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class SparseDistribution(NamedTuple):
    """A distribution over the vocabulary that is stored for its `top_k` tokens only.

    Attributes:
        indices (`torch.Tensor`): Token ids, `[positions, top_k]`.
        probs (`torch.Tensor`): Their probabilities in float32, `[positions, top_k]`.
    """

    indices: torch.Tensor
    probs: torch.Tensor


def plausible_tokens(base: torch.Tensor, novice: torch.Tensor, plausibility: float) -> torch.Tensor:
    """Plausibility constraint, after contrastive decoding (arXiv 2210.15097, eq. 3).

    Args:
        base (`torch.Tensor`): Log-probabilities of the reference, `[positions, vocab]`.
        novice (`torch.Tensor`): Log-probabilities of the novice, `[positions, vocab]`.
        plausibility (`float`): Share of the largest probability below which a token is dropped; `0` keeps all.

    Returns:
        `torch.Tensor`: Boolean mask `[positions, vocab]` of tokens whose probability under the even mixture of `base`
        and `novice` is at least `plausibility` times the largest.
    """
    mixture = torch.logaddexp(base, novice)
    if plausibility == 0:
        return torch.ones_like(mixture, dtype=torch.bool)
    threshold = torch.as_tensor(plausibility, dtype=mixture.dtype, device=mixture.device).log()
    return mixture >= mixture.amax(-1, keepdim=True) + threshold


def erasure_target(
    base_logits: torch.Tensor,
    expert_logits: torch.Tensor,
    novice_logits: torch.Tensor,
    *,
    eta: float | torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    plausibility: float = 0.0,
) -> SparseDistribution:
    """Target of the erase term: `t = b − η·(e − n)` in log-probabilities (arXiv 2410.02760, the erasing objective).

    Args:
        base_logits (`torch.Tensor`): Reference without context, `[positions, vocab]`.
        expert_logits (`torch.Tensor`): Expert at the same positions, `[positions, vocab]`.
        novice_logits (`torch.Tensor`): Novice at the same positions, `[positions, vocab]`.
        eta (`float` or `torch.Tensor`): Strength, one for all or one per position `[positions]`.
        temperature (`float`, *optional*, defaults to `1.0`): τ, dividing all three logits.
        top_k (`int`, *optional*): Tokens kept per position; `None` keeps the vocabulary.
        plausibility (`float`, *optional*, defaults to `0.0`): See [`plausible_tokens`].

    Returns:
        [`SparseDistribution`]: softmax over the kept tokens; tokens that are not plausible have probability 0.
    """
    base, expert, novice = (
        (logits.float() / temperature).log_softmax(-1) for logits in (base_logits, expert_logits, novice_logits)
    )
    if isinstance(eta, torch.Tensor):
        eta = eta[:, None]
    scores = base - eta * (expert - novice)
    scores = scores.masked_fill(~plausible_tokens(base, novice, plausibility), -torch.inf)
    top = scores.topk(top_k or scores.size(-1), dim=-1)
    return SparseDistribution(top.indices, top.values.softmax(-1))


def ramped_eta(positions: torch.Tensor, lengths: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """η of the released code: linear from `start` at a text's first token to `end` at its last.

    Args:
        positions (`torch.Tensor`): Index of each token within its text, any shape.
        lengths (`torch.Tensor`): Number of tokens of that text, same shape.
        start (`float`): η of the first token.
        end (`float`): η of the last token.
    """
    return start + (end - start) * positions / (lengths - 1).clamp(min=1)


def top_k_distribution(logits: torch.Tensor, top_k: int | None = None) -> SparseDistribution:
    """The `top_k` most probable tokens of `softmax(logits)` with their true (not renormalised) probabilities."""
    probs = logits.float().softmax(-1)
    top = probs.topk(top_k or probs.size(-1), dim=-1)
    return SparseDistribution(top.indices, top.values)


def soft_cross_entropy(logits: torch.Tensor, target: SparseDistribution) -> torch.Tensor:
    """`−Σ_v t(v)·log p(v)` per position, `[positions]`, for a target that sums to one."""
    log_probs = logits.gather(-1, target.indices).float() - logits.float().logsumexp(-1, keepdim=True)
    return -(target.probs * log_probs).sum(-1)


def kl_to_reference(logits: torch.Tensor, reference: SparseDistribution) -> torch.Tensor:
    """`KL(reference ‖ adapted)` per position, `[positions]`, over the reference's top tokens and one bucket for the rest.

    By the data processing inequality this never exceeds the KL over the vocabulary, and equals it when the reference
    is stored whole.
    """
    log_probs = logits.gather(-1, reference.indices).float() - logits.float().logsumexp(-1, keepdim=True)
    kept = torch.special.xlogy(reference.probs, reference.probs) - reference.probs * log_probs
    if reference.indices.size(-1) == logits.size(-1):
        return kept.sum(-1)
    tiny = torch.finfo(torch.float32).eps
    rest = (1 - reference.probs.sum(-1)).clamp(min=0)
    log_rest = torch.log1p(-log_probs.exp().sum(-1).clamp(max=1 - tiny))
    return kept.sum(-1) + torch.special.xlogy(rest, rest) - rest * log_rest


def kl_divergence(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`KL(reference ‖ adapted)` per position over the whole vocabulary, `[positions]`, from logits `[positions, vocab]`."""
    log_probs, log_reference = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    return F.kl_div(log_probs, log_reference, log_target=True, reduction="none").sum(-1)


def argmax_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the reference's most probable token per position, `[positions]` (the released code's retain)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


class KeepPositions:
    """Run the LM head on chosen positions only, inside the model's own forward.

    The head's input `[batch, seq, hidden]` is reduced to `[1, kept, hidden]` by a forward pre-hook, so the model still
    applies its own scaling or soft-capping, and no `[batch, seq, vocab]` tensor is made.

    Args:
        head (`nn.Module`): Output embeddings of the model.
        positions (`torch.Tensor`): Flat indices `row * seq + column` of the positions to keep, `[kept]`.
    """

    def __init__(self, head: nn.Module, positions: torch.Tensor):
        self._head = head
        self._positions = positions

    def __enter__(self) -> None:
        self._handle = self._head.register_forward_pre_hook(self._reduce)

    def __exit__(self, *_) -> None:
        self._handle.remove()

    def _reduce(self, _, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].flatten(0, 1).index_select(0, self._positions).unsqueeze(0), *args[1:])


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


def position_weights(expert: torch.Tensor, novice: torch.Tensor, text: torch.Tensor, texts: int, share: float):
    """Weights of the positions in the erase term: where expert and novice differ, there the knowledge is.

    Args:
        expert (`torch.Tensor`): Logits of the expert, `[positions, vocab]`.
        novice (`torch.Tensor`): Logits of the novice, `[positions, vocab]`.
        text (`torch.Tensor`): Which text each position belongs to, `[positions]`.
        texts (`int`): Number of texts.
        share (`float`): Share of a text's weight that is spread in proportion to `KL(expert ‖ novice)`; the rest is
            spread evenly.

    Returns:
        `torch.Tensor`: weights `[positions]` whose mean over each text is 1.
    """
    expert, novice = expert.float().log_softmax(-1), novice.float().log_softmax(-1)
    divergence = (expert.exp() * (expert - novice)).sum(-1).clamp(min=1e-6)
    return (1 - share) + share * divergence / text_means(divergence, text, texts)[text]


def _positions_per_text(values: torch.Tensor, text: torch.Tensor, texts: int) -> torch.Tensor:
    return text_sums(torch.ones_like(values), text, texts).clamp(min=1)
