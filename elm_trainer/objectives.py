"""Targets and losses of single positions as pure functions, named after the equations in docs/papers.md, and their means over texts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


# Log-probability in nats below which a token of both expert and novice is noise, and never chosen.
_NOISE = -16.0


def text_mean(values: torch.Tensor, text: torch.Tensor, texts: int) -> torch.Tensor:
    """Mean over texts of the mean over each text's positions; a text without positions counts as 0.

    Unlike a mean over tokens it does not depend on how texts are split over batches, accumulation steps or processes.
    `values` has one value per position and `text` the number of its text, both `[positions]`.
    """
    return text_means(values, text, texts).mean()


def text_means(values: torch.Tensor, text: torch.Tensor, texts: int) -> torch.Tensor:
    """Mean over each text's positions, `[texts]`; 0 for a text without positions. Arguments as of [`text_mean`]."""
    positions = text_sums(torch.ones_like(values), text, texts)
    return text_sums(values, text, texts) / positions.clamp(min=1)


def text_sums(values: torch.Tensor, text: torch.Tensor, texts: int) -> torch.Tensor:
    """Sum over each text's positions, `[texts]`. Arguments as of [`text_mean`]."""
    return values.new_zeros(texts).index_add(0, text, values)


def position_weights(values: torch.Tensor, text: torch.Tensor, texts: int, share: float) -> torch.Tensor:
    """Weights of the positions in the erase term, `[positions]`, whose mean over each text is 1: a `share` of a text's weight
    is spread in proportion to `values`, the [`disagreement`] of expert and novice, and the rest evenly. Arguments as of
    [`text_mean`].
    """
    return (1 - share) + share * values / text_means(values, text, texts)[text]


class SparseDistribution(NamedTuple):
    """A distribution over the vocabulary that is stored for its `top_k` tokens only."""

    indices: torch.Tensor  # token ids, `[positions, top_k]`
    probs: torch.Tensor  # their probabilities in float32, `[positions, top_k]`

    def part(self, where: slice) -> "SparseDistribution":
        """The same for some of the positions."""
        return SparseDistribution(self.indices[where], self.probs[where])


def plausible_tokens(base: torch.Tensor, novice: torch.Tensor, plausibility: float) -> torch.Tensor:
    """Plausibility constraint, after contrastive decoding (arXiv 2210.15097, eq. 3).

    Returns:
        `torch.Tensor`: Boolean mask `[positions, vocab]` of tokens whose probability under the even mixture of `base` and
        `novice`, log-probabilities of that shape, is at least `plausibility` times the largest; `0` keeps all.
    """
    if plausibility == 0:
        return torch.ones_like(base, dtype=torch.bool)
    mixture = torch.logaddexp(base, novice)
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
        base_logits, expert_logits, novice_logits (`torch.Tensor`): Reference without context, expert and novice at the
            same positions, `[positions, vocab]`.
        eta: Strength, one for all or one per position `[positions]`.
        temperature: τ, dividing all three logits.
        top_k: Tokens kept per position; `None` keeps the vocabulary.
        plausibility: See [`plausible_tokens`].

    Returns:
        [`SparseDistribution`]: softmax over the kept tokens; tokens that are not plausible have probability 0.
    """
    base, expert, novice = (
        (logits.float() / temperature).log_softmax(-1) for logits in (base_logits, expert_logits, novice_logits)
    )
    scores = base - _column(eta) * (expert - novice)
    if plausibility:
        scores = scores.masked_fill(~plausible_tokens(base, novice, plausibility), -torch.inf)
    top = scores.topk(top_k or scores.size(-1), dim=-1)
    return SparseDistribution(top.indices, top.values.softmax(-1))


def _column(eta: float | torch.Tensor) -> float | torch.Tensor:
    """η of each position, `[positions, 1]`, if they have one each."""
    return eta[:, None] if isinstance(eta, torch.Tensor) else eta


class LogTarget(NamedTuple):
    """A distribution that differs from a reference's in the odds of a few tokens only."""

    indices: torch.Tensor  # ids of these tokens, `[positions, tokens]`
    log_probs: torch.Tensor  # their log-probabilities in float32, in nats, `[positions, tokens]`

    def part(self, where: slice) -> "LogTarget":
        """The same for some of the positions."""
        return LogTarget(self.indices[where], self.log_probs[where])

    def over(self, logits: torch.Tensor) -> torch.Tensor:
        """All log-probabilities, `[positions, vocab]`: what these tokens leave is shared as the logits of the reference, or of its
        novice, `[positions, vocab]`, share it.

        What they leave is 1 less the sum of their float32 probabilities, and at least 1e-6. So the probabilities of the
        other tokens are off by up to 2e-6 in all, and their logarithms by as much divided by what is left.
        """
        others = logits.float().scatter(-1, self.indices, -torch.inf).log_softmax(-1)
        left = torch.log1p(-self.log_probs.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6))
        return (others + left).scatter(-1, self.indices, self.log_probs)


def log_space_target(
    base_logits: torch.Tensor,
    expert_logits: torch.Tensor,
    novice_logits: torch.Tensor,
    *,
    eta: float | torch.Tensor,
    tokens: int,
) -> LogTarget:
    """ELM's target `t = b − η·(e − n)` (arXiv 2410.02760), applied where the knowledge is: at the `tokens` that the expert prefers
    most, while all others keep the reference's odds.

        log t(v) = b(v) − η·(e(v) − n(v))   for the tokens of largest e − n, as far as it is above 0,
        log t(v) = b(v)                     for all others, then normalized.

    What the expert alone knows falls to what the novice thinks of it, and the answer that is left is the reference's
    next guess, another one for every subject. (The tokens that the *novice* prefers are left alone: they are alike for
    all subjects, and raising them would teach one wrong answer to all questions.)

    Args:
        base_logits, expert_logits, novice_logits (`torch.Tensor`): As of [`erasure_target`], `[positions, vocab]`.
        eta: Strength, one for all or one per position `[positions]`.
        tokens: Tokens at which the equation is taken.

    Returns:
        [`LogTarget`]: the chosen tokens with their log-probabilities, after normalization.
    """
    base, expert, novice = (logits.float().log_softmax(-1) for logits in (base_logits, expert_logits, novice_logits))
    apart = (expert - novice).masked_fill((expert < _NOISE) & (novice < _NOISE), 0).clamp(min=0)
    chosen = apart.topk(min(tokens, base.size(-1)), dim=-1)
    shifted = base.gather(-1, chosen.indices) - _column(eta) * chosen.values
    others = base.scatter(-1, chosen.indices, -torch.inf).logsumexp(-1, keepdim=True)
    total = torch.logaddexp(others, shifted.logsumexp(-1, keepdim=True))
    return LogTarget(chosen.indices, shifted - total)


def _log_probs_at(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of some tokens, `[positions, tokens]`, from logits `[positions, vocab]`."""
    return logits.gather(-1, indices).float() - logits.float().logsumexp(-1, keepdim=True)


def log_space_loss(logits: torch.Tensor, target: LogTarget) -> torch.Tensor:
    """Smooth L1 between log-probabilities and their targets, its mean over the chosen tokens per position, `[positions]`.

    Quadratic up to one nat and linear beyond, so that single tokens that lie far off do not rule the gradient.
    """
    log_probs = _log_probs_at(logits, target.indices)
    return F.smooth_l1_loss(log_probs, target.log_probs, reduction="none").mean(-1)


def log_space_divergence(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`KL(reference ‖ adapted)` and half the variance over the vocabulary of `log p − log p_ref`, their sum per position,
    `[positions]`, from logits `[positions, vocab]`.

    KL holds what is probable. For small changes it is half their variance under the reference; the second part is half
    their variance with every token counting alike, so that improbable answers keep their ranks. The number that all
    log-probabilities of a position share (their normalizer) does not count.
    """
    log_probs, log_reference = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    difference = log_probs - log_reference
    return -(log_reference.exp() * difference).sum(-1) + difference.var(-1, correction=0) / 2


def ramped_eta(positions: torch.Tensor, lengths: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """η of the released code: linear from `start` at a text's first token to `end` at its last, for the index of each token
    within its text, of any shape, and the number of tokens of that text, of the same shape.
    """
    return start + (end - start) * positions / (lengths - 1).clamp(min=1)


def top_k_distribution(logits: torch.Tensor, top_k: int | None = None) -> SparseDistribution:
    """The `top_k` most probable tokens of `softmax(logits)` with their true (not renormalized) probabilities."""
    probs = logits.float().softmax(-1)
    top = probs.topk(top_k or probs.size(-1), dim=-1)
    return SparseDistribution(top.indices, top.values)


def soft_cross_entropy(logits: torch.Tensor, target: SparseDistribution) -> torch.Tensor:
    """`−Σ_v t(v)·log p(v)` per position, `[positions]`, for a target that sums to one."""
    log_probs = _log_probs_at(logits, target.indices)
    return -(target.probs * log_probs).sum(-1)


def kl_to_reference(logits: torch.Tensor, reference: SparseDistribution) -> torch.Tensor:
    """`KL(reference ‖ adapted)` per position, `[positions]`, over the reference's top tokens and one bucket for the rest.

    By the data processing inequality this never exceeds the KL over the vocabulary, and equals it when the reference
    is stored whole.
    """
    log_probs = _log_probs_at(logits, reference.indices)
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


def log_mean_probs(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logarithm of the mean of several distributions, `[positions, vocab]`, from logits of that shape.

    A mixture gives each of several answers its share, where the mean of log-probabilities gives none of them any.
    """
    total = logits[0].float().softmax(-1)
    for part in logits[1:]:
        total = total + part.float().softmax(-1)
    return (total / len(logits)).clamp(min=torch.finfo(torch.float32).tiny).log()
