"""Half precision: η = 1000 multiplies whatever is rounded away, so logits are combined in float32."""

import math
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from elm_trainer import ElmTrainer
from elm_trainer.methods.elm_config import stored_targets
from elm_trainer.objectives import erasure_target, kl_to_reference, soft_cross_entropy, top_k_distribution

from .methods import METHODS, tiny, trained


POSITIONS, VOCABULARY = 16, 4096


@pytest.fixture
def logits():
    """Reference, expert and novice, as far apart as those of a model whose contexts matter."""
    generator = torch.Generator().manual_seed(0)
    base = 4 * torch.randn(POSITIONS, VOCABULARY, generator=generator)
    return base, *(base + torch.randn(POSITIONS, VOCABULARY, generator=generator) for _ in range(2))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_target_of_half_precision_logits_is_that_of_the_same_numbers_in_float32(dtype, autocast, logits):
    half = [part.to(dtype) for part in logits]
    expected = erasure_target(*(part.float() for part in half), eta=1000.0, top_k=50)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = erasure_target(*half, eta=1000.0, top_k=50)
    assert found.probs.dtype == torch.float32
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.probs, expected.probs, rtol=0, atol=0)
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(POSITIONS))


def test_combined_in_half_precision_the_target_would_be_another(logits):
    base, expert, novice = (part.bfloat16() for part in logits)
    combined = (base - 1000 * (expert - novice)).float()
    target = erasure_target(base, expert, novice, eta=1000.0, top_k=50)
    assert torch.topk(combined, 2).values.diff().eq(0).any(), "ties, where float32 has none"
    assert (combined.argmax(-1) != target.indices[:, 0]).any()


@pytest.mark.parametrize("plausibility", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_logits_of_a_type_give_finite_targets_and_losses(dtype, plausibility):
    largest = torch.finfo(dtype).max if dtype == torch.float16 else 1e30
    base = torch.zeros(3, 64, dtype=dtype)
    expert, novice = base.clone(), base.clone()
    base[:, 0], base[:, 1] = largest, -largest
    expert[:, 2], novice[:, 3] = largest, largest
    target = erasure_target(base, expert, novice, eta=1000.0, top_k=8, plausibility=plausibility)
    assert target.probs.isfinite().all() and target.indices.max() < 64

    adapted = base.clone().requires_grad_()
    reference = top_k_distribution(base, 8)
    for losses in (soft_cross_entropy(adapted, target), kl_to_reference(adapted, reference)):
        assert losses.dtype == torch.float32 and losses.isfinite().all()
        (gradient,) = torch.autograd.grad(losses.sum(), adapted)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_eta_1000_trains_under_bf16_autocast(weights, tokenizer, dataset, config, lora):
    trainer = ElmTrainer(
        tiny("llama", len(tokenizer)).to(weights),
        config(eta=1000.0, bf16=True, use_cpu=True, max_steps=3),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    before = trained(trainer.model)
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        assert all(math.isfinite(entry[name]) for name in ("loss", "erase_loss", "retain_loss", "consistency_loss"))
    assert [name for name, weight in trained(trainer.model).items() if torch.equal(weight, before[name])] == []


@pytest.fixture
def quantized(tokenizer, tmp_path):
    # Blocks of four-bit weights hold 64 of one row.
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits)


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes, which quantises, is not installed")
@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_trains_on_a_base_of_four_bits(name, quantized, tokenizer, dataset, settings, lora):
    frozen = {key: weight.detach().clone() for key, weight in quantized.named_parameters()}
    method = METHODS[name]
    trainer = method.trainer(
        quantized,
        settings(method.config, use_cpu=True, **method.fields),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    before = trained(trainer.model)
    trainer.train()

    assert any(type(weight).__name__ == "Params4bit" for weight in trainer.model.parameters())
    logged = trainer.state.log_history[0]
    assert all(math.isfinite(logged[f"{term}_loss"]) for term in method.terms)
    assert [key for key, weight in trained(trainer.model).items() if torch.equal(weight, before[key])] == []
    now = {
        key.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for key, weight in trainer.model.named_parameters()
    }
    assert [key for key, weight in frozen.items() if not torch.equal(weight, now[key])] == []


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes, which quantises, is not installed")
def test_gradients_pass_a_base_of_four_bits_after_it_was_evaluated(quantized, tokenizer, dataset, settings, lora):
    method = METHODS["npo"]
    trainer = method.trainer(
        quantized,
        settings(method.config, use_cpu=True),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    gradients = []
    for _ in range(2):
        trainer.model.zero_grad()
        # The first time, its reference is run within; the second time, it was run before.
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append(
            {name: weight.grad.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)
        assert "lora_A" in name or gradient.any(), name


def bfloat16_elm(make_elm, tokenizer, dtype, **fields):
    trainer = make_elm(eta=500.0, precompute_targets=False, **fields)
    for tensor in trainer.model.get_base_model().parameters():
        tensor.data = tensor.data.bfloat16().to(dtype)
    return trainer


@pytest.mark.parametrize("fields", [{}, {"retain_loss": "log", "log_tokens": 3}])
def test_targets_in_float32_are_those_of_a_float32_model_and_the_weights_stay(fields, make_elm, dataset, tokenizer):
    trainers = [
        bfloat16_elm(make_elm, tokenizer, dtype, dataset=dataset, target_dtype=target_dtype, **fields)
        for dtype, target_dtype in ((torch.float32, None), (torch.bfloat16, "float32"), (torch.bfloat16, None))
    ]
    before = {name: p.clone() for name, p in trainers[1].model.named_parameters()}
    found = []
    for trainer in trainers:
        inputs = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
        found.append(trainer.targets(trainer.model, {"erase": inputs["forget"], "retain": inputs["retain"]}))
    for term, target in found[0].items():
        for name, values in target.items():
            assert torch.equal(values, found[1][term][name])
    probs = "log_probs" if fields else "probs"
    assert not torch.equal(found[0]["erase"][probs], found[2]["erase"][probs])
    for name, parameter in trainers[1].model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name])
    trainers[1].train()
    assert math.isfinite(trainers[1].state.log_history[0]["erase_loss"])


def test_targets_in_float32_are_kept_under_a_name_of_their_own(config):
    plain, wide = config(), config(target_dtype="float32")
    assert plain.precompute_targets is None and wide.precompute_targets
    first, second = (stored_targets(args, 64, 16).settings for args in (plain, wide))
    assert second == first | {"target_dtype": "float32"}
    with pytest.raises(ValueError, match="`target_dtype` is 'bfloat16'"):
        config(target_dtype="bfloat16")
