"""Targets and losses of single positions, as pure functions named after the equations of DESIGN §5 and §8."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class SparseDistribution(NamedTuple):
    """A distribution over the vocabulary that is stored for its `top_k` tokens only.

    Attributes:
        indices (`torch.Tensor`): Token ids, `[positions, top_k]`.
        probs (`torch.Tensor`): Their probabilities in float32, `[positions, top_k]`.
    """

    indices: torch.Tensor
    probs: torch.Tensor

    def part(self, where: slice) -> "SparseDistribution":
        """The same for some of the positions."""
        return SparseDistribution(self.indices[where], self.probs[where])


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


def disagreement(expert: torch.Tensor, novice: torch.Tensor) -> torch.Tensor:
    """`KL(expert ‖ novice)` per position, `[positions]`, from logits `[positions, vocab]`: where the knowledge is.

    Never quite 0, so that a text on which the two agree everywhere still has weights.
    """
    expert, novice = expert.float().log_softmax(-1), novice.float().log_softmax(-1)
    return (expert.exp() * (expert - novice)).sum(-1).clamp(min=1e-6)


def mean_log_probs(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of several log-probabilities, `[positions, vocab]`, from logits of that shape; of one, its logits as they are."""
    if len(logits) == 1:
        return logits[0]
    return torch.stack([part.float().log_softmax(-1) for part in logits]).mean(0)
