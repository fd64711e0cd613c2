import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elm_trainer.objectives import (
    LogTarget,
    SparseDistribution,
    disagreement,
    erasure_target,
    kl_divergence,
    kl_to_reference,
    log_mean_probs,
    log_space_divergence,
    log_space_loss,
    log_space_target,
    mean_log_probs,
    plausible_tokens,
    position_weights,
    ramped_eta,
    soft_cross_entropy,
    text_mean,
    text_means,
    text_sums,
    top_k_distribution,
)


def logits(positions, vocab, seed, scale=3.0):
    return scale * torch.randn(positions, vocab, generator=torch.Generator().manual_seed(seed))


def slow_target(base, expert, novice, eta, temperature, top_k, plausibility):
    """The target of one position in float64, token by token."""
    rows = []
    for b, e, n in zip(base.tolist(), expert.tolist(), novice.tolist(), strict=True):

        def log_softmax(values):
            values = [value / temperature for value in values]
            top = max(values)
            total = top + math.log(sum(math.exp(value - top) for value in values))
            return [value - total for value in values]

        b, e, n = log_softmax(b), log_softmax(e), log_softmax(n)
        mixture = [(math.exp(x) + math.exp(y)) / 2 for x, y in zip(b, n, strict=True)]
        kept = [v for v in range(len(b)) if mixture[v] >= plausibility * max(mixture) * (1 - 1e-9)]
        scores = {v: b[v] - eta * (e[v] - n[v]) for v in kept}
        best = sorted(scores, key=scores.get, reverse=True)[:top_k]
        top = max(scores[v] for v in best)
        total = sum(math.exp(scores[v] - top) for v in best)
        rows.append([math.exp(scores[v] - top) / total if v in best else 0.0 for v in range(len(b))])
    return torch.tensor(rows, dtype=torch.float64)


def dense(sparse, vocab):
    out = torch.zeros(len(sparse.probs), vocab, dtype=torch.float64)
    return out.scatter(1, sparse.indices, sparse.probs.double())


@settings(deadline=None, max_examples=60)
@given(
    positions=st.integers(1, 5),
    vocab=st.integers(2, 17),
    eta=st.sampled_from([0.0, 0.5, 3.0, 40.0]),
    temperature=st.sampled_from([0.5, 1.0, 1.2]),
    plausibility=st.sampled_from([0.0, 1e-3, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_target_agrees_with_a_slow_float64_loop(positions, vocab, eta, temperature, plausibility, seed):
    base, expert, novice = (logits(positions, vocab, seed + offset) for offset in range(3))
    top_k = min(vocab, 5)
    target = erasure_target(
        base, expert, novice, eta=eta, temperature=temperature, top_k=top_k, plausibility=plausibility
    )
    expected = slow_target(base, expert, novice, eta, temperature, top_k, plausibility)
    torch.testing.assert_close(dense(target, vocab), expected, atol=2e-4, rtol=1e-3)


def test_target_without_erasure_is_the_reference():
    base, expert, novice = (logits(4, 9, seed) for seed in range(3))
    torch.testing.assert_close(dense(erasure_target(base, expert, novice, eta=0.0), 9), base.softmax(-1).double())


def test_infinite_strength_puts_all_mass_on_what_the_novice_says_most_over_the_expert_among_plausible_tokens():
    base, expert, novice = (logits(6, 11, seed) for seed in range(3))
    target = erasure_target(base, expert, novice, eta=1e6, plausibility=0.05)
    plausible = plausible_tokens(base.log_softmax(-1), novice.log_softmax(-1), 0.05)
    gap = (novice.log_softmax(-1) - expert.log_softmax(-1)).masked_fill(~plausible, -torch.inf)
    assert target.indices[:, 0].tolist() == gap.argmax(-1).tolist()
    torch.testing.assert_close(target.probs[:, 0], torch.ones(6))


def test_distilling_the_reference_has_no_gradient_at_the_reference():
    base = logits(5, 13, 0).requires_grad_()
    target = erasure_target(base.detach(), logits(5, 13, 1), logits(5, 13, 2), eta=0.0)
    soft_cross_entropy(base, target).sum().backward()
    torch.testing.assert_close(base.grad, torch.zeros_like(base), atol=1e-6, rtol=0)


@given(top_k=st.integers(1, 12), seed=st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_stored_kl_never_exceeds_the_full_kl_and_equals_it_when_stored_whole(top_k, seed):
    adapted, reference = logits(3, 12, seed), logits(3, 12, seed + 1)
    log_q, log_p = adapted.log_softmax(-1), reference.log_softmax(-1)
    full = (log_p.exp() * (log_p - log_q)).sum(-1)
    stored = kl_to_reference(adapted, top_k_distribution(reference, top_k))
    assert (stored <= full + 1e-4).all() and (stored >= -1e-5).all()
    if top_k == 12:
        torch.testing.assert_close(stored, full, atol=1e-4, rtol=1e-4)


def test_soft_cross_entropy_matches_the_dense_formula():
    scores, target = logits(4, 8, 0), logits(4, 8, 1).softmax(-1)
    sparse = SparseDistribution(torch.arange(8).repeat(4, 1), target)
    expected = -(target * scores.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(soft_cross_entropy(scores, sparse), expected)


def test_divergence_over_the_vocabulary_is_that_of_its_definition_and_of_a_reference_stored_whole():
    adapted, reference = logits(4, 9, 0), logits(4, 9, 1)
    log_q, log_p = adapted.double().log_softmax(-1), reference.double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).float()
    torch.testing.assert_close(kl_divergence(adapted, reference), expected)
    torch.testing.assert_close(kl_to_reference(adapted, top_k_distribution(reference)), expected)
    assert kl_divergence(adapted, adapted).abs().max() < 1e-6


def test_eta_ramps_from_the_first_token_to_the_last():
    positions, lengths = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 3, 3, 1])
    assert ramped_eta(positions, lengths, 1.0, 1000.0).tolist() == [1.0, 500.5, 1000.0, 1.0]


def test_the_disagreement_is_the_divergence_and_never_quite_nothing():
    expert, novice = logits(4, 9, 0), logits(4, 9, 1)
    torch.testing.assert_close(disagreement(expert, novice), kl_divergence(novice, expert))
    assert disagreement(expert, expert).tolist() == pytest.approx([1e-6] * 4, abs=2e-6)


def test_the_mean_of_log_probabilities_is_that_of_each_and_one_stays_as_it_is():
    first, second = logits(3, 7, 0), logits(3, 7, 1)
    expected = (first.log_softmax(-1) + second.log_softmax(-1)) / 2
    torch.testing.assert_close(mean_log_probs([first, second]), expected)
    assert mean_log_probs([first]) is first


@settings(deadline=None, max_examples=60)
@given(
    positions=st.integers(1, 4),
    vocab=st.integers(3, 17),
    tokens=st.integers(1, 20),
    eta=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    seed=st.integers(0, 1000),
)
@example(positions=3, vocab=15, tokens=13, eta=0.0, seed=0)
@example(positions=1, vocab=10, tokens=9, eta=1.0, seed=260)
def test_the_target_in_log_space_is_elms_equation_at_the_experts_tokens_alone(positions, vocab, tokens, eta, seed):
    b, e, n = (logits(positions, vocab, seed + part) for part in range(3))
    chosen = log_space_target(b, e, n, eta=eta, tokens=tokens)
    whole = chosen.over(b)
    base, expert, novice = (part.double().log_softmax(-1) for part in (b, e, n))
    for position in range(positions):
        best = sorted(range(vocab), key=lambda v: (novice - expert)[position, v].item())[:tokens]
        apart = (expert - novice)[position].clamp(min=0)
        scores = [base[position, v] - (eta * apart[v] if v in best else 0) for v in range(vocab)]
        expected = torch.stack(scores).log_softmax(-1)
        assert {v for v in best if apart[v]} <= set(chosen.indices[position].tolist())
        torch.testing.assert_close(
            chosen.log_probs[position].double(), expected[chosen.indices[position]], rtol=0, atol=1e-4
        )
        # The others share what the chosen ones leave, a difference of float32 numbers: exact as a probability alone.
        torch.testing.assert_close(whole[position].double().exp(), expected.exp(), rtol=0, atol=2e-6)
        if tokens >= vocab or 1 - expected[chosen.indices[position]].exp().sum() > 1e-3:
            torch.testing.assert_close(whole[position].double(), expected, rtol=0, atol=2e-3)


def test_in_log_space_all_other_tokens_keep_their_odds_and_nothing_is_shared_by_all_subjects():
    b, n = logits(1, 9, 0), logits(1, 9, 1)
    chosen = log_space_target(b, b, n, eta=1.0, tokens=3)
    others = [v for v in range(9) if v not in chosen.indices[0].tolist()]
    found = chosen.over(b)[0, others].double()
    before = b.double().log_softmax(-1)[0, others]
    torch.testing.assert_close(found - before, (found - before)[:1].expand(len(others)), rtol=0, atol=1e-5)


def test_noise_that_neither_expert_nor_novice_would_say_is_never_chosen():
    b = torch.tensor([[0.0, -1.0, -30.0, -40.0]])
    n = torch.tensor([[-1.0, 0.0, -40.0, -30.0]])
    assert log_space_target(b, b, n, eta=1.0, tokens=1).indices.tolist() == [[0]]


def test_the_loss_in_log_space_is_quadratic_near_and_linear_far():
    values = torch.tensor([[0.0, -1.0, -2.0, -9.0]])
    log_probs = values.log_softmax(-1)
    target = LogTarget(torch.tensor([[1, 3]]), log_probs[:, [1, 3]] + torch.tensor([[0.5, -4.0]]))
    assert log_space_loss(values, target).item() == pytest.approx((0.5**2 / 2 + 3.5) / 2, rel=1e-5)
    exact = LogTarget(torch.tensor([[1, 3]]), log_probs[:, [1, 3]])
    assert log_space_loss(values, exact).item() == pytest.approx(0, abs=1e-10)


@settings(deadline=None, max_examples=40)
@given(positions=st.integers(1, 4), vocab=st.integers(2, 20), shift=st.floats(-5, 5), seed=st.integers(0, 1000))
def test_the_divergence_in_log_space_is_kl_and_half_the_variance_of_the_change(positions, vocab, shift, seed):
    adapted, reference = logits(positions, vocab, seed), logits(positions, vocab, seed + 1)
    one, other = adapted.double().log_softmax(-1), reference.double().log_softmax(-1)
    change = one - other
    centered = change - change.mean(-1, keepdim=True)
    expected = (other.exp() * (other - one)).sum(-1) + centered.square().mean(-1) / 2
    found = log_space_divergence(adapted + shift, reference)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert log_space_divergence(adapted, adapted).abs().max() < 1e-5


def test_the_mean_of_probabilities_gives_each_answer_its_share():
    one, other = torch.tensor([[10.0, 0.0, 0.0]]), torch.tensor([[0.0, 10.0, 0.0]])
    expected = ((one.softmax(-1) + other.softmax(-1)) / 2).log()
    torch.testing.assert_close(log_mean_probs([one, other]), expected)
    assert log_mean_probs([one, other]).exp()[0, :2].tolist() == pytest.approx([0.5, 0.5], abs=1e-3)


def test_position_weights_average_one_over_each_text_and_follow_the_disagreement():
    text = torch.tensor([0, 0, 0, 1, 1])
    weights = position_weights(torch.tensor([1.0, 4.0, 1.0, 2.0, 2.0]), text, 2, share=0.5)
    torch.testing.assert_close(text_mean(weights, text, 2), torch.tensor(1.0))
    assert weights.tolist() == pytest.approx([0.75, 1.5, 0.75, 1.0, 1.0])


def test_text_mean_does_not_depend_on_the_split_into_batches():
    values, text = torch.tensor([1.0, 2.0, 6.0, 4.0]), torch.tensor([0, 0, 1, 1])
    whole = text_mean(values, text, 2)
    halves = (text_mean(values[:2], text[:2], 1) + text_mean(values[2:], text[:2], 1)) / 2
    assert whole.item() == halves.item() == pytest.approx(3.25)


def test_sums_and_means_of_a_text_without_positions_are_zero():
    values, text = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2, 2, 0])
    assert text_sums(values, text, 3).tolist() == [6.0, 0.0, 3.0]
    assert text_means(values, text, 3).tolist() == [6.0, 0.0, 1.5]


def test_without_the_constraint_no_mixture_is_made(monkeypatch):
    logits = torch.randn(3, 4, 20)
    expected = erasure_target(*logits, eta=3.0, plausibility=1e-30)
    monkeypatch.setattr(torch, "logaddexp", lambda *_: pytest.fail("a mixture was made"))
    found = erasure_target(*logits, eta=3.0)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.probs, expected.probs)
    assert plausible_tokens(*logits[:2], 0.0).all()
