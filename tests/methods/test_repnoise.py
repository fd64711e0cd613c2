import math
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from elm_trainer.head import CHUNK
from elm_trainer.methods.repnoise import (
    RepNoiseConfig,
    RepNoiseTrainer,
    SumOverPieces,
    ascent_term,
    differing_tokens,
    gaussian_mmd,
    official_weights,
    text_weights,
)

from .methods import SHAPES, tiny


@pytest.fixture
def trainer_of(tokenizer, dataset, settings):
    """A trainer without dropout, whose adapter is not at its start, where half of all gradients would be 0."""

    def make(model, modules_to_save=None, **fields):
        lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=modules_to_save)
        trainer = RepNoiseTrainer(
            model,
            settings(RepNoiseConfig, use_cpu=True, **fields),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora,
        )
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            # Norms too: with weights of 1 a second one would change nothing.
            if "lora_B" in name or parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.data.add_(noise * 0.1)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return trainer

    return make


def batch_of(trainer, rows=4):
    examples = [trainer.train_dataset[index] for index in range(rows)]
    return trainer._prepare_inputs(trainer.data_collator(examples))


def loss_and_gradients(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), gradients_of(trainer)


def gradients_of(trainer):
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------------------------- kernel


def slow_mmd(source, target):
    """The definition, one pair of points after the other."""
    points = [*source, *target]
    pairs = [(a, b) for a in range(len(points)) for b in range(len(points))]
    distance = {(a, b): ((points[a] - points[b]) ** 2).sum() for a, b in pairs}
    sigma = sum(distance[pair].detach() for pair in pairs) / (len(points) ** 2 - len(points)) / 4
    kernel = {pair: sum(torch.exp(-distance[pair] / (sigma * width)) for width in (1, 2, 4, 8, 16)) for pair in pairs}
    half = len(source)
    total = 0
    for a in range(half):
        for b in range(half):
            total = total + kernel[a, b] + kernel[half + a, half + b] - kernel[a, half + b] - kernel[half + a, b]
    return total / half**2


def samples(*shape, seed=0, shift=0.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


@pytest.mark.parametrize("count", [1, 3])
def test_the_mmd_of_a_sample_with_itself_is_zero(count):
    source = samples(count, 7)
    assert abs(gaussian_mmd(source, source.clone()).item()) < 1e-12


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_mmd_of_two_single_points_is_a_constant(scale):
    closed = 2 * (5 - sum(math.exp(-(2.0**power)) for power in (2, 1, 0, -1, -2)))
    assert closed == pytest.approx(6.18628, abs=5e-6)
    value = gaussian_mmd(samples(1, 9) * scale, samples(1, 9, seed=1) * scale)
    assert value.item() == pytest.approx(closed, abs=1e-6)


def test_the_constant_mmd_of_two_single_points_still_draws_them_together():
    source, target = samples(1, 9).requires_grad_(), samples(1, 9, seed=1)
    gaussian_mmd(source, target).backward()
    # d/dx of −2·Σ exp(−‖x − y‖²/(2^i·σ)) with σ = ‖x − y‖²/4 held fixed.
    difference = source.detach() - target
    square = difference.square().sum()
    slope = 4 * sum(math.exp(-4 / 2**i) / (2**i * square / 4) for i in range(5))
    torch.testing.assert_close(source.grad, slope * difference)


def test_the_mmd_and_its_gradient_are_those_of_the_definition():
    ours, theirs = (samples(4, 11, shift=0.3).requires_grad_() for _ in range(2))
    target = samples(4, 11, seed=1)
    fast, slow = gaussian_mmd(ours, target), slow_mmd(theirs, target)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    fast.backward()
    slow.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 5),
    features=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([1e-2, 1.0, 1e2]),
    shift=st.floats(-5, 5),
)
def test_the_mmd_is_symmetric_never_negative_and_blind_to_order(count, features, seed, scale, shift):
    source, target = samples(count, features, seed=seed) * scale, samples(count, features, seed=seed + 1, shift=shift)
    value = gaussian_mmd(source, target)
    assert value >= -1e-12
    torch.testing.assert_close(value, gaussian_mmd(target, source), rtol=0, atol=1e-10)
    orders = torch.Generator().manual_seed(seed)
    shuffled = (part[torch.randperm(count, generator=orders)] for part in (source, target))
    torch.testing.assert_close(value, gaussian_mmd(*shuffled), rtol=0, atol=1e-10)


def test_the_mmd_is_taken_in_float32_under_autocast():
    source, target = samples(3, 50).float(), samples(3, 50, seed=1, shift=0.2).float()
    exact = gaussian_mmd(source, target)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gaussian_mmd(source, target), exact, rtol=0, atol=0)


def test_the_ascent_term_is_the_logarithm_of_the_mean_and_one():
    total = torch.tensor(12.0, dtype=torch.float64)
    assert ascent_term(total, 3).item() == pytest.approx(math.log(1 + 12 / 4), abs=1e-12)
    assert ascent_term(torch.zeros(()), 3).item() == 0


def test_a_sum_over_pieces_has_the_gradients_of_the_plain_sum():
    weight = samples(5, 3)
    pieces = [samples(4, 5, seed=seed).requires_grad_(seed != 1) for seed in range(3)]

    def function(piece):
        return (piece @ weight).tanh().sum()

    plain = sum(function(piece) for piece in pieces)
    expected = torch.autograd.grad(3 * plain, [pieces[0], pieces[2]])
    ours = SumOverPieces.apply(function, *pieces)
    torch.testing.assert_close(ours, plain)
    for gradient, other in zip(torch.autograd.grad(3 * ours, [pieces[0], pieces[2]]), expected, strict=True):
        torch.testing.assert_close(gradient, other)
    with torch.no_grad():
        torch.testing.assert_close(SumOverPieces.apply(function, *pieces), plain)


# ------------------------------------------------------------------------------------------------------------- the loss


def text_nll(logits, batch):
    """Cross-entropy as the mean over texts of the mean over their tokens, one token after the other."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    total = 0
    for text in range(len(ids)):
        places = [place for place in range(1, ids.size(1)) if mask[text, place] and mask[text, place - 1]]
        for place in places:
            total = total - logits[text, place - 1].log_softmax(-1)[ids[text, place]] / len(places) / len(ids)
    return total


def official_nll(logits, ids, mask):
    """The official code's masked cross-entropy: logits times mask, labels times mask, and no label of id 0."""
    labels = ids[:, 1:] * mask[:, 1:]
    labels = labels.masked_fill(labels == 0, -100)
    return F.cross_entropy((logits[:, :-1] * mask[:, :-1, None]).flatten(0, 1), labels.flatten())


def slow_loss(trainer, batch, alpha, beta, noise, faithful=False):
    """The whole loss from padded forwards, hidden states of all layers and full logits, and the terms of S.

    The noise is given layer by layer. Texts are padded on the right.
    """
    model = trainer.model
    base = model.get_base_model()
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    norm, layers = {
        "GPT2Model": lambda: (decoder.ln_f, decoder.h),
        "GPTNeoXModel": lambda: (decoder.final_layer_norm, decoder.layers),
    }.get(type(decoder).__name__, lambda: (decoder.norm, decoder.layers))()
    activations = []
    handles = [layer.mlp.register_forward_hook(lambda _, __, output: activations.append(output)) for layer in layers]
    forget, retain = (
        model(
            input_ids=batch[name]["input_ids"],
            attention_mask=batch[name]["attention_mask"],
            output_hidden_states=True,
            use_cache=False,
        )
        for name in ("forget", "retain")
    )
    for handle in handles:
        handle.remove()

    mask = batch["forget"]["attention_mask"]
    last = forget.hidden_states[-1]
    if faithful:
        last = norm(last)
        ids, masks = (
            {name: batch[name][key] for name in ("forget", "retain")} for key in ("input_ids", "attention_mask")
        )
        width = max(part.size(1) for part in ids.values())
        forget_ids, retain_ids = (F.pad(part, (0, width - part.size(1)), value=-1) for part in ids.values())
        # Padding, which the official code counts where the other text goes on, is never counted here.
        masks = {name: mask * (forget_ids != retain_ids)[:, : mask.size(1)] for name, mask in masks.items()}
        mask = masks["forget"]

    def nll(logits, name):
        return (
            official_nll(logits, batch[name]["input_ids"], masks[name]) if faithful else text_nll(logits, batch[name])
        )

    read = [*(head(norm(state)) for state in forget.hidden_states[:-1]), head(last)]
    terms = [nll(logits, "forget") for logits in (forget.logits, *read)]
    distances = []
    for index, drawn in enumerate(noise):
        pair = (part * mask[..., None] for part in (activations[index], drawn.view_as(activations[index])))
        distances.append(slow_mmd(*(part.flatten(1) for part in pair)))
    loss = nll(retain.logits, "retain") + beta * sum(distances) / len(distances)
    return loss - alpha * torch.log(1 + sum(terms) / len(forget.hidden_states)), terms


def noise_of(trainer, batch):
    """What the trainer draws at its first step."""
    hidden, dtype = trainer.model.config.hidden_size, next(trainer.model.parameters()).dtype
    generator = trainer._generator(torch.device("cpu"))
    trainer._drawn = (-1, 0)
    shape = (len(batch["forget"]["lengths"]) * max(batch["forget"]["lengths"]), hidden)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in trainer._layers]


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-6)])
def test_loss_and_gradient_are_those_of_a_slow_derivation(
    faithful, checkpointing, dtype, tolerance, tokenizer, trainer_of
):
    model = tiny("llama", len(tokenizer)).to(dtype)
    trainer = trainer_of(model, alpha=0.7, beta=3.0, faithful=faithful, gradient_checkpointing=checkpointing)
    trainer.model.train()
    batch = batch_of(trainer)
    # A label of id 0, which the official code passes over.
    for key in ("input_ids", "labels"):
        batch["forget"][key][0, 2] = 0
    noise = noise_of(trainer, batch)
    loss, gradients = loss_and_gradients(trainer, batch)

    trainer.model.zero_grad()
    expected, terms = slow_loss(trainer, batch, 0.7, 3.0, noise, faithful)
    expected.backward()

    assert len(terms) == len(trainer._layers) + 2
    assert loss == pytest.approx(expected.item(), abs=tolerance)
    for name, gradient in gradients_of(trainer).items():
        assert gradient.abs().max() > 10 * tolerance
        torch.testing.assert_close(gradients[name], gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_every_architecture_is_that_of_a_slow_derivation(shape, tokenizer, trainer_of):
    trainer = trainer_of(tiny(shape, len(tokenizer)), beta=0.3)
    trainer.model.train()
    batch = batch_of(trainer)
    noise = noise_of(trainer, batch)
    loss, _ = loss_and_gradients(trainer, batch)
    with torch.no_grad():
        assert loss == pytest.approx(slow_loss(trainer, batch, 1.0, 0.3, noise)[0].item(), abs=1e-5)


def test_the_final_norm_and_the_head_may_be_trained_too(tokenizer, trainer_of):
    trainer = trainer_of(tiny("llama", len(tokenizer)), modules_to_save=["norm", "lm_head"], beta=3.0)
    trainer.model.train()
    batch = batch_of(trainer)
    noise = noise_of(trainer, batch)
    _, gradients = loss_and_gradients(trainer, batch)
    trainer.model.zero_grad()
    slow_loss(trainer, batch, 1.0, 3.0, noise)[0].backward()
    for name, gradient in gradients_of(trainer).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_official_quirks_change_the_loss(tokenizer, trainer_of):
    losses = []
    for faithful in (False, True):
        trainer = trainer_of(tiny("llama", len(tokenizer)), faithful=faithful)
        losses.append(trainer.compute_loss(trainer.model, batch_of(trainer)).item())
    assert abs(losses[0] - losses[1]) > 1e-3


def test_tokens_are_compared_from_the_start_of_both_texts():
    left, right = (
        {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        for ids, mask in (
            ([[9, 9, 1, 2, 3]], [[0, 0, 1, 1, 1]]),
            ([[1, 4, 3, 5, 9, 9, 9]], [[1, 1, 1, 1, 0, 0, 0]]),
        )
    )
    assert differing_tokens(left, right).tolist() == [[False, False, False, True, False]]
    assert differing_tokens(right, left).tolist() == [[False, True, False, True, False, False, False]]


def test_official_weights_give_positions_behind_a_shared_token_a_constant():
    batch = {
        "input_ids": torch.tensor([[1, 5, 0, 6]]),
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
        "labels": torch.tensor([[-100, 5, 0, 6]]),
        "rows": torch.zeros(3, dtype=torch.long),
        "columns": torch.arange(3),
    }
    other = {"input_ids": torch.tensor([[1, 7, 8]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    weights = official_weights(batch, other, vocabulary=10, dtype=torch.float64)
    # Token 1 is shared, so 5 is predicted by zeros; 0 is no label; 6 is predicted by the logits.
    assert weights.values.tolist() == [0, 0, 0.5]
    assert weights.constant.item() == pytest.approx(0.5 * math.log(10), abs=1e-12)


def test_texts_weigh_the_same_whatever_their_length():
    batch = {"input_ids": torch.zeros(2, 5), "rows": torch.tensor([0, 1, 1, 1])}
    assert text_weights(batch, torch.float64).values.tolist() == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=1e-12)


@pytest.mark.parametrize("faithful", [False, True])
def test_padding_has_no_influence(faithful, tokenizer, trainer_of):
    losses = []
    for side, multiple in (("right", None), ("right", 16), ("left", 16)):
        tokenizer.padding_side = side
        try:
            trainer = trainer_of(
                tiny("gpt2", len(tokenizer)), beta=3.0, faithful=faithful, pad_to_multiple_of=multiple
            )
            trainer.model.train()
            losses.append(loss_and_gradients(trainer, batch_of(trainer)))
        finally:
            tokenizer.padding_side = "right"
    for loss, gradients in losses[1:]:
        assert loss == pytest.approx(losses[0][0], abs=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, losses[0][1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1e-3)])
def test_a_weight_of_zero_skips_its_term(alpha, beta, tokenizer, trainer_of):
    trainer = trainer_of(tiny("llama", len(tokenizer)), alpha=alpha, beta=beta)
    batch = batch_of(trainer)
    trainer.packed.final_logits(trainer.model)  # measured once for all steps
    trainer.packed.texts_interact(trainer.model)
    calls = []
    trainer._norm.register_forward_hook(lambda *_: calls.append("norm"))
    trainer.compute_loss(trainer.model, batch)
    trainer.log({})
    logged = {name.removeprefix("eval_") for name in trainer.state.log_history[-1] if name.endswith("_loss")}
    assert logged == {"retain_loss"} | ({"ascent_loss"} if alpha else set()) | ({"noise_loss"} if beta else set())
    # Once in the forward, once more for what enters each layer.
    assert len(calls) == (1 + len(trainer._layers) if alpha else 1)


def test_without_weights_the_loss_is_the_cross_entropy_of_the_retain_text(tokenizer, trainer_of):
    trainer = trainer_of(tiny("llama", len(tokenizer)).double(), alpha=0.0, beta=0.0)
    batch = batch_of(trainer)
    loss, gradients = loss_and_gradients(trainer, batch)
    retain = batch["retain"]
    logits = trainer.model(input_ids=retain["input_ids"], attention_mask=retain["attention_mask"]).logits
    trainer.model.zero_grad()
    expected = text_nll(logits, retain)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    for name, gradient in gradients_of(trainer).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-9)


# -------------------------------------------------------------------------------------------------------------- memory


def peak_bytes(function):
    """The most bytes of tensors, made by the function, that lived at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return made


def test_the_logits_of_no_two_layers_live_at_once(tokenizer, trainer_of):
    layers, vocabulary = 10, len(tokenizer)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2)
    trainer = trainer_of(LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)))
    trainer.model.train()
    batch = batch_of(trainer, rows=2)
    noise = noise_of(trainer, batch)
    positions = sum(len(batch[name]["rows"]) for name in ("forget", "retain"))

    with LargestTensor() as largest:
        loss_and_gradients(trainer, batch)
    assert largest.numel <= max(CHUNK, positions * 32)

    peak = peak_bytes(lambda: loss_and_gradients(trainer, batch))
    slow = peak_bytes(lambda: slow_loss(trainer, batch, 1.0, 1e-3, noise)[0].backward())
    logits_of_all_layers = layers * len(batch["forget"]["rows"]) * vocabulary * 4
    assert peak < logits_of_all_layers < slow


# --------------------------------------------------------------------------------------------------------------- noise


def draws(trainer, count):
    """Noise losses of the same batch, one call after the other."""
    batch, seen = batch_of(trainer), []
    mode = "train" if trainer.model.training else "eval"
    with torch.no_grad():
        for _ in range(count):
            trainer.compute_loss(trainer.model, batch)
            seen += trainer._mean_terms(mode)["noise_loss"]
            trainer._totals[mode].clear()
    return seen


def test_the_noise_depends_on_seed_step_and_place_in_the_accumulation(tokenizer, trainer_of):
    seen = []
    for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0)):
        trainer = trainer_of(tiny("llama", len(tokenizer)), seed=seed)
        trainer.model.train()
        trainer.state.global_step = step
        seen.append(draws(trainer, 3))
    assert seen[0] == seen[1]
    values = [value for run in seen[1:] for value in run]
    assert len(set(values)) == len(values)


def test_evaluations_draw_the_same_noise_and_change_nothing_of_the_training(tokenizer, trainer_of):
    trainer = trainer_of(tiny("llama", len(tokenizer)))
    trainer.model.train()
    plain = draws(trainer, 2)

    trainer = trainer_of(tiny("llama", len(tokenizer)))
    trainer.model.train()
    state = torch.get_rng_state()
    first = draws(trainer, 1)
    trainer.model.eval()
    evaluated = draws(trainer, 2)
    trainer.model.train()
    assert first + draws(trainer, 1) == plain
    assert evaluated[0] == evaluated[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_noise_pulls_the_activations_towards_it(tokenizer, trainer_of):
    trainer = trainer_of(
        tiny("llama", len(tokenizer)), alpha=0.0, beta=100.0, learning_rate=1e-2, max_steps=12, max_grad_norm=0.0
    )
    trainer.train()
    losses = [entry["noise_loss"] for entry in trainer.state.log_history if "noise_loss" in entry]
    assert losses[-1] < losses[0] - 0.05


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_negative_weight_is_named_with_its_value(name):
    with pytest.raises(ValueError, match=f"`{name}` is -0.5: it must be at least 0"):
        RepNoiseConfig("unused", bf16=False, **{name: -0.5})


def test_a_model_without_mlps_is_refused_unless_none_is_needed(tokenizer, trainer_of):
    sizes = dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
    model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), **sizes))
    with pytest.raises(ValueError, match="`beta` needs .* OPTDecoderLayer has only .*'fc1'.*: set `beta=0`"):
        trainer_of(model)
    trainer = trainer_of(OPTForCausalLM(model.config), beta=0.0)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["ascent_loss"])


def test_reentrant_checkpointing_is_refused(tokenizer, trainer_of):
    with pytest.raises(ValueError, match="`gradient_checkpointing_kwargs` has `use_reentrant=True`"):
        trainer_of(
            tiny("llama", len(tokenizer)),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )


def test_every_reading_of_a_layer_runs_in_mixed_precision_and_hardly_changes_the_loss(tokenizer, trainer_of):
    losses = []
    for bf16 in (False, True):
        trainer = trainer_of(tiny("llama", len(tokenizer)), bf16=bf16, beta=3.0, max_steps=1)
        trainer.packed.final_logits(trainer.model)  # measured once for all steps
        trainer.packed.texts_interact(trainer.model)
        dtypes, forward = [], trainer._head.forward

        def watched(states, forward=forward, dtypes=dtypes):
            dtypes.append(forward(states).dtype)
            return forward(states)

        trainer._head.forward = watched
        trainer.train()
        # Retain text, forget text, the model's own call on no position, and every layer.
        assert dtypes == [torch.bfloat16 if bf16 else torch.float32] * (3 + len(trainer._layers))
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
