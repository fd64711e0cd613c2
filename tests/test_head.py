from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

from elm_trainer import head as head_module
from elm_trainer.head import (
    STATES,
    FinalLogits,
    Plan,
    ReadHead,
    final_logits,
    keep_positions,
    read_positions,
    without_gradients,
)


SIZES = dict(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def tiny(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def linear(trained=False, width=6, vocabulary=11):
    torch.manual_seed(1)
    return nn.Linear(width, vocabulary).requires_grad_(trained)


def nll_of(labels):
    return lambda logits, where: nn.functional.cross_entropy(logits, labels[where], reduction="none")


@pytest.fixture
def chunk_of(monkeypatch):
    """Makes chunks of some positions for a vocabulary of 11."""
    return lambda positions: monkeypatch.setattr(head_module, "CHUNK", 11 * positions)


@pytest.mark.parametrize("trained", [False, True])
@settings(deadline=None, max_examples=40)
@given(
    positions=st.integers(0, 9),
    chunk=st.integers(1, 10),
    final=st.sampled_from([FinalLogits(), FinalLogits(scale=0.25), FinalLogits(cap=3.0), FinalLogits(2.0, 5.0)]),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients_in_chunks_are_those_of_the_whole(trained, positions, chunk, final, seed):
    head, generator = linear(trained), torch.Generator().manual_seed(seed)
    states = torch.randn(positions, 6, generator=generator).requires_grad_()
    labels = torch.randint(11, (positions,), generator=generator)
    slopes = torch.randn(positions, generator=generator)
    inputs = [states, *(head.parameters() if trained else [])]

    def loss(values):
        # Not linear in the values: each has another weight in the gradient.
        return (slopes * values**2).sum()

    expected = nll_of(labels)(final(head(states)), slice(None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_module, "CHUNK", 11 * chunk)
        made = read_positions(head, final, nll_of(labels), states, vocabulary=11)
    torch.testing.assert_close(made, expected)
    ours, theirs = (torch.autograd.grad(loss(values), inputs) for values in (made, expected))
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other)


def test_further_states_are_read_at_the_same_positions_and_get_no_gradient(chunk_of):
    chunk_of(2)
    head, states, other = linear(), torch.randn(5, 6).requires_grad_(), torch.randn(5, 6).requires_grad_()

    def distance(logits, where, further):
        return (logits - further).square().sum(-1)

    made = read_positions(head, FinalLogits(), distance, states, [other], vocabulary=11)
    torch.testing.assert_close(made, (head(states) - head(other)).square().sum(-1))
    made.sum().backward()
    assert states.grad is not None and other.grad is None


def test_without_gradients_a_reading_may_give_several_tensors(chunk_of):
    chunk_of(2)
    head, states = linear(), torch.randn(5, 6)
    values, indices = read_positions(head, FinalLogits(), lambda logits, where: logits.topk(3), states, vocabulary=11)
    expected = head(states).topk(3)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(indices, expected.indices) and indices.shape == (5, 3)


def test_no_tensor_of_the_step_is_larger_than_a_chunk_of_logits():
    head, vocabulary = nn.Linear(8, 4096, bias=False).requires_grad_(False), 4096
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(part.numel() for part in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(part))
            return result

    states, labels = torch.randn(5000, 8).requires_grad_(), torch.zeros(5000, dtype=torch.long)
    with Watch():
        read_positions(head, FinalLogits(), nll_of(labels), states, vocabulary=vocabulary).mean().backward()
    assert max(sizes) == head_module.CHUNK < 5000 * vocabulary / 2


@pytest.mark.parametrize(
    ("device", "gigabytes", "megabytes"),
    [("cuda", 80, 256), ("xpu", 8, 128), ("cuda", 1, 32), ("cpu", 0, 32), ("mps", 0, 32)],
)
def test_chunks_are_larger_where_an_accelerator_has_the_memory(device, gigabytes, megabytes, monkeypatch):
    module = SimpleNamespace(get_device_properties=lambda _: SimpleNamespace(total_memory=gigabytes * 2**30))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    assert 4 * head_module.chunk_of(torch.device(device)) == megabytes * 2**20


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SIZES), FinalLogits()),
        (GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2), FinalLogits()),
        (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=7.0), FinalLogits(cap=7.0)),
        (CohereConfig(**SIZES, logit_scale=0.0625), FinalLogits(scale=0.0625)),
        (GraniteConfig(**SIZES, logits_scaling=8.0), FinalLogits(scale=0.125)),
    ],
)
def test_what_a_model_does_to_its_logits_is_measured(config, expected):
    model = tiny(config)
    found = final_logits(model, model.get_output_embeddings(), 64)
    assert found.scale == pytest.approx(expected.scale) and found.cap == expected.cap
    ids = torch.arange(6, 18).view(2, 6)
    whole = model(input_ids=ids).logits
    reader = ReadHead(
        model.get_output_embeddings(), found, torch.tensor([1, 4, 9]), [3], [Plan(lambda logits, where: logits)], 64
    )
    with torch.no_grad(), reader.reading():
        (read,) = reader.results(model(input_ids=ids).logits)
    torch.testing.assert_close(read, whole.flatten(0, 1)[[1, 4, 9]], rtol=1e-5, atol=1e-5)


def test_measuring_leaves_mode_and_random_state_alone():
    model = tiny(LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    state = torch.random.get_rng_state()
    final_logits(model, model.get_output_embeddings(), 64)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)


def test_autocast_keeps_no_cast_of_a_forward_without_gradients():
    layer, states = nn.Linear(3, 3, bias=False), torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with without_gradients():
            before = layer(states)
            layer.weight.add_(1)
        after = layer(states)
        assert torch.is_autocast_cache_enabled()
    assert after.requires_grad
    torch.testing.assert_close(after, before + 3, rtol=0.02, atol=0.02)


class Casts(TorchDispatchMode):
    """Counts the casts of tensors of a shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "compiled", "readings", "casts"),
    [
        (True, False, [STATES], 0),
        (True, False, [None], 1),
        (True, False, [lambda logits, where: logits.float().logsumexp(-1), STATES], 1),
        (True, True, [STATES], 1),  # left to autocast
        (False, False, [STATES], 1),
    ],
)
def test_a_frozen_head_is_cast_once_or_not_at_all(frozen, compiled, readings, casts, chunk_of):
    model = tiny(LlamaConfig(**SIZES))
    ids, head = torch.arange(6, 18).view(2, 6), model.get_output_embeddings()
    head.weight.requires_grad_(not frozen)
    plans, counts = [Plan(reading) for reading in readings], [12 // len(readings)] * len(readings)
    chunk_of(12)  # of two positions, for a vocabulary of 64
    found = []
    for spares in (False, True):
        reader = ReadHead(head, FinalLogits(), torch.arange(12), counts, plans, 64, compiled or not spares)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), Casts(head.weight.shape) as counted, reader.reading():
            logits = model(input_ids=ids).logits
            read = reader.results(logits)
        # What enters the head has no gradient, so that the model's own output must keep the graph whole.
        (sum(part.float().sum() for part in read) + 0 * logits.float().sum()).backward()
        found.append((read, model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    assert counted.count == casts and "forward" not in vars(head)
    for before, after in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(before, after) and before.dtype == after.dtype
    assert torch.equal(found[0][1], found[1][1])


def test_a_model_that_does_something_else_to_its_logits_is_named():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny(LlamaConfig(**SIZES))

        def forward(self, **inputs):
            output = self.inner(**inputs)
            output.logits[..., 20:] = -100.0
            return output

    model = Masked()
    with pytest.raises(NotImplementedError, match="Masked changes its head's output by more than a scale"):
        final_logits(model, model.inner.get_output_embeddings(), 64)


def test_plans_of_one_forward_get_what_they_ask_for():
    model = tiny(LlamaConfig(**SIZES))
    ids, head = torch.arange(6, 18).view(2, 6), model.get_output_embeddings()
    output = model(input_ids=ids, output_hidden_states=True)
    whole, states = output.logits.flatten(0, 1), output.hidden_states[-1].flatten(0, 1)
    plans = [Plan(), Plan(lambda logits, where: logits.logsumexp(-1)), Plan(STATES), Plan()]
    reader = ReadHead(head, FinalLogits(), torch.tensor([0, 3, 5, 8, 11, 2]), [1, 2, 2, 1], plans, 64)
    with reader.reading():
        first, sums, kept, last = reader.results(model(input_ids=ids).logits)
    torch.testing.assert_close(torch.cat([first, last]), whole[[0, 2]])
    torch.testing.assert_close(sums, whole[[3, 5]].logsumexp(-1))
    torch.testing.assert_close(kept, states[[8, 11]])
    assert not kept.requires_grad
    torch.testing.assert_close(model(input_ids=ids).logits.flatten(0, 1), whole)


def test_kept_positions_have_the_logits_of_a_full_forward(tiny_model):
    ids = torch.randint(5, 1000, (2, 6))
    full = tiny_model(input_ids=ids).logits
    with keep_positions(tiny_model.get_output_embeddings(), torch.tensor([1, 5, 8])):
        kept = tiny_model(input_ids=ids).logits
    torch.testing.assert_close(kept[0], torch.stack([full[0, 1], full[0, 5], full[1, 2]]))
    torch.testing.assert_close(tiny_model(input_ids=ids).logits, full)
