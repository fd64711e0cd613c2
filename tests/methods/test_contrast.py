import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, VeraConfig
from scipy.linalg import eigh

from elm_trainer import ElmTrainer
from elm_trainer.methods.placement import contrast_directions

from .methods import tiny, trained


def moment(rows: int, width: int, seed: int) -> torch.Tensor:
    inputs = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    return inputs.T @ inputs / rows


def test_of_separate_directions_those_of_the_largest_ratio_are_chosen():
    forget, retain = torch.diag(torch.tensor([1.0, 8.0, 3.0, 4.0])), torch.diag(torch.tensor([10.0, 2.0, 1.0, 4.0]))
    found = contrast_directions(forget, retain, 2, damping=1e-9)
    assert found.abs().argmax(-1).tolist() == [1, 2]
    torch.testing.assert_close(((found @ forget) * found).sum(-1), torch.full((2,), 1 / 3))


@settings(max_examples=20, deadline=None)
@given(width=st.integers(3, 12), seed=st.integers(0, 1000), damping=st.sampled_from([0.01, 0.1, 1.0]))
def test_the_ratios_are_those_of_an_independent_solver(width, seed, damping):
    forget, retain = moment(40, width, seed), moment(40, width, seed + 1)
    found = contrast_directions(forget, retain, 2, damping).double().numpy()
    damped = retain.double().numpy() + damping * retain.trace().item() / width * np.eye(width)
    expected = eigh(forget.double().numpy(), damped, eigvals_only=True)[::-1][:2]
    ratios = [u @ forget.double().numpy() @ u / (u @ damped @ u) for u in found]
    np.testing.assert_allclose(ratios, expected, rtol=1e-3)


def test_in_half_precision_the_moments_are_summed_in_float32(tokenizer, dataset, config, lora):
    directions = []
    for bf16 in (False, True):
        args = config(contrast_rows=4, bf16=bf16, use_cpu=True, contrast_damping=1.0)
        trainer = ElmTrainer(
            tiny("llama", len(tokenizer)), args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora
        )
        directions.append([p for name, p in trainer.model.named_parameters() if "lora_A" in name])
    for one, other in zip(*directions, strict=True):
        # The strongest direction is the same up to its sign and the rounding of states.
        assert torch.cosine_similarity(one[0], other[0], dim=0).abs() > 0.95


def test_the_directions_are_frozen_and_the_model_is_left_as_it_was(tokenizer, dataset, config, lora):
    model = tiny("llama", len(tokenizer))
    ids = torch.arange(5, 15)[None]
    before = model(ids).logits
    trainer = ElmTrainer(
        model, config(contrast_rows=4), train_dataset=dataset, processing_class=tokenizer, peft_config=lora
    )
    torch.testing.assert_close(trainer.model(ids).logits, before, rtol=0, atol=0)
    names = list(trained(trainer.model))
    assert names and all("lora_B" in name for name in names)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        if name in start:
            assert torch.equal(p, start[name]) is ("lora_A" in name), name


def test_modules_that_read_the_same_tensor_share_directions_and_a_second_trainer_chooses_the_same(
    tokenizer, dataset, config, lora
):
    found = []
    for _ in range(2):
        trainer = ElmTrainer(
            tiny("llama", len(tokenizer)), config(contrast_rows=8), train_dataset=dataset, processing_class=tokenizer,
            peft_config=lora,
        )  # fmt: skip
        found.append({name: p for name, p in trainer.model.named_parameters() if "lora_A" in name})
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())
    by_module = {name.split(".lora_A")[0].split("layers.")[1]: p for name, p in found[0].items()}
    assert torch.equal(by_module["0.self_attn.q_proj"], by_module["0.self_attn.v_proj"])
    assert not torch.equal(by_module["0.self_attn.q_proj"], by_module["0.mlp.up_proj"])
    assert not torch.equal(by_module["0.self_attn.q_proj"], by_module["1.self_attn.q_proj"])


def test_the_adapter_answers_to_forget_text_far_more_than_to_retain_text(tokenizer, dataset, config):
    trainer = ElmTrainer(
        tiny("llama", len(tokenizer)), config(contrast_rows=8), train_dataset=dataset, processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    responses: dict[str, list[float]] = {"forget": [], "retain": []}
    for side, kept in responses.items():
        handles = [
            module.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.square().mean().item()))
            for name, module in trainer.model.named_modules()
            if name.endswith("lora_A.default")
        ]
        for row in trainer.train_dataset:
            trainer.model(input_ids=torch.tensor([row[f"{side}_ids"]]))
        for handle in handles:
            handle.remove()
    assert np.mean(responses["forget"]) > 2 * np.mean(responses["retain"])


def test_a_saved_adapter_gives_the_same_logits(tokenizer, dataset, config, lora, tmp_path):
    trainer = ElmTrainer(
        tiny("llama", len(tokenizer)), config(contrast_rows=4), train_dataset=dataset, processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.arange(5, 15)[None]
    loaded = PeftModel.from_pretrained(tiny("llama", len(tokenizer)), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-6)


def test_an_adapter_without_a_matrix_a_is_refused(tokenizer, dataset, config):
    with pytest.raises(ValueError, match="`contrast_rows` is 4, but the adapter 'default' has no LoRA layer"):
        ElmTrainer(
            tiny("llama", len(tokenizer)), config(contrast_rows=4), train_dataset=dataset,
            processing_class=tokenizer, peft_config=VeraConfig(r=4, target_modules=["q_proj"]),
        )  # fmt: skip


def test_the_response_to_forget_text_has_the_size_of_pefts_own_directions(tokenizer, dataset, config, lora):
    """However many rows choose: a sum in place of a mean would make the adapter learn many times more slowly."""
    sizes = []
    for rows in (1, 8):
        trainer = ElmTrainer(
            tiny("llama", len(tokenizer)), config(contrast_rows=rows, fact_share=0.0),
            train_dataset=dataset.select([0] * 8), processing_class=tokenizer, peft_config=lora,
        )  # fmt: skip
        [layer] = [m for n, m in trainer.model.named_modules() if n.endswith("layers.0.self_attn.q_proj")]
        kept: list[torch.Tensor] = []
        handle = layer.lora_A["default"].register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[0]))
        trainer.model(input_ids=torch.tensor([trainer.train_dataset[0]["forget_ids"]]))
        handle.remove()
        sizes.append(kept[0].square().mean(0).sqrt())
    torch.testing.assert_close(sizes[0], torch.full_like(sizes[0], 3**-0.5), rtol=0.05, atol=0)
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0.05, atol=0)
