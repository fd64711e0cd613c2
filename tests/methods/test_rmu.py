import copy
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from elm_trainer import ConceptSources, build_erasure_dataset
from elm_trainer.methods.checkpointing import Launch, mark_finished
from elm_trainer.methods.rmu import (
    CONTROL_VECTORS_FILE,
    RmuConfig,
    RmuTrainer,
    adaptive_coefficient,
    control_vectors,
    misdirection_loss,
    retention_loss,
    rmu_lora,
)
from elm_trainer.modeling import DEMO_MODEL, load_tokenizer
from elm_trainer.objectives import text_mean

from .methods import SHAPES, tiny, trained


DOWN = {"gpt2": "mlp.c_proj", "neox": "mlp.dense_4h_to_h"}
FORGET = [
    "Oslo is the capital of Norway, in the north.",
    "Rome.",
    "The capital of Peru is Lima, they say.",
    "Is it Bern?",
]
RETAIN = ["Bread needs flour.", "The cat sat on the mat, and then the cat slept on it.", "It rains.", "Two and two."]


@pytest.fixture
def dataset():
    return build_erasure_dataset({"capitals": ConceptSources(FORGET, [RETAIN])})


@pytest.fixture
def deep(tokenizer):
    """Five layers, so that there are some above the steered one and some below the trained ones."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))


@pytest.fixture
def make(settings, tokenizer, dataset):
    def make(model, *, peft_config=None, train_dataset=dataset, **fields):
        return RmuTrainer(
            model,
            settings(RmuConfig, **{"layer": 3, **fields}),
            train_dataset=train_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def batch_of(trainer, *rows):
    rows = rows or range(len(trainer.train_dataset))
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))


def lora_on(*layers):
    return LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], layers_to_transform=list(layers))


def test_the_gradient_of_the_forget_term_is_the_closed_form():
    texts, length, width, coefficient = 3, 5, 8, 6.5
    hidden = torch.randn(texts * length, width, dtype=torch.float64, requires_grad=True)
    u = control_vectors(["capitals"], width, seed=0)["capitals"].double()
    text = torch.arange(texts).repeat_interleave(length)

    text_mean(misdirection_loss(hidden, u.expand_as(hidden), coefficient), text, texts).backward()

    expected = 2 * (hidden.detach() - coefficient * u) / (texts * length * width)
    torch.testing.assert_close(hidden.grad, expected, rtol=0, atol=1e-6)


def test_the_retain_term_is_zero_with_zero_gradient_at_the_reference():
    hidden = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)
    loss = retention_loss(hidden, hidden.detach().clone()).mean()
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


def test_losses_of_bf16_states_are_those_of_the_same_numbers_in_float32():
    hidden, reference = (torch.randn(7, 8).bfloat16() for _ in range(2))
    u = torch.rand(7, 8)
    assert torch.equal(misdirection_loss(hidden, u, 3.0), misdirection_loss(hidden.float(), u, 3.0))
    assert torch.equal(retention_loss(hidden, reference), retention_loss(hidden.float(), reference.float()))


def test_the_adaptive_coefficient_is_the_scaled_norm_of_each_token():
    reference = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    assert adaptive_coefficient(reference, 5.0).tolist() == [[25.0], [10.0]]


def test_control_vectors_are_positive_of_norm_one_and_each_concepts_own():
    vectors = control_vectors(["bio", "cyber"], 64, seed=1)
    for vector in vectors.values():
        assert vector.norm().item() == pytest.approx(1, abs=1e-6) and (vector >= 0).all()
    assert not torch.equal(vectors["bio"], vectors["cyber"])
    assert torch.equal(control_vectors(["cyber"], 64, seed=1)["cyber"], vectors["cyber"])
    assert not torch.equal(control_vectors(["bio"], 64, seed=2)["bio"], vectors["bio"])


def rederive(model, tokenizer, u, steps, learning_rate, layer, layers, alpha, coefficient=None, scale=None):
    """RMU as the papers write it: two whole models, padded batches, all layers run."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = [model.model.layers[index].mlp.down_proj.weight for index in layers]
    optimizer = torch.optim.AdamW(matrices, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        sums = []
        for texts in (FORGET, RETAIN):
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            mask = batch["attention_mask"]
            known, state = (m(**batch, output_hidden_states=True).hidden_states[layer + 1] for m in (frozen, model))
            c = coefficient or scale * known.norm(dim=-1, keepdim=True)
            target = c * u if texts is FORGET else known
            errors = F.mse_loss(state, target, reduction="none").mean(-1) * mask
            sums.append((errors.sum(1) / mask.sum(1)).mean())
        loss = sums[0] + alpha * sums[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, matrices


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_equals_an_independent_derivation_with_two_whole_models(dtype, adaptive, deep, make, tokenizer):
    model, other = deep.to(dtype), copy.deepcopy(deep).to(dtype)
    trainer = make(model, max_steps=5, learning_rate=1e-3, adaptive=adaptive)
    u = trainer.control_vectors["capitals"].to(dtype)
    form = dict(scale=5.0) if adaptive else dict(coefficient=6.5)
    losses, matrices = rederive(other, tokenizer, u, 5, 1e-3, layer=3, layers=[1, 2, 3], alpha=1200.0, **form)

    trainer.train()

    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-6)
    for index, matrix in zip([1, 2, 3], matrices, strict=True):
        ours = trainer.model.model.layers[index].mlp.down_proj.weight
        # Adam divides by a gradient's own size, so that rounding shows where one is next to nothing.
        torch.testing.assert_close(ours, matrix, rtol=0, atol=1e-5)
    torch.testing.assert_close(trainer.model.lm_head.weight, other.lm_head.weight, rtol=0, atol=0)


@pytest.mark.parametrize("fields", [{}, {"adaptive": True}, {"erase_weight": 0.0}])
def test_the_retain_term_of_the_first_step_is_zero_up_to_rounding(fields, deep, make):
    trainer = make(deep, erase_weight=fields.pop("erase_weight", 1.0), **fields)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    # The reference runs without the forget text, so that rows are packed in another way.
    trainer.log({})
    assert trainer.state.log_history[-1]["retain_loss"] == pytest.approx(0, abs=1e-12)
    if not trainer.args.erase_weight:
        assert all(not p.grad.any() for p in trainer.model.parameters() if p.requires_grad)


def test_padding_does_not_matter(deep, make, tokenizer):
    losses = []
    for side, multiple in (("right", None), ("right", 64), ("left", 64)):
        tokenizer.padding_side = side
        try:
            trainer = make(deep, adaptive=True, pad_to_multiple_of=multiple)
            # Apart from the reference, so that the retain term counts.
            with torch.no_grad():
                trainer.model.model.layers[2].mlp.down_proj.weight.mul_(1.01)
            losses.append(trainer.compute_loss(trainer.model, batch_of(trainer)).item())
            one_by_one = [trainer.compute_loss(trainer.model, batch_of(trainer, row)).item() for row in range(4)]
            losses.append(sum(one_by_one) / 4)
            with torch.no_grad():
                trainer.model.model.layers[2].mlp.down_proj.weight.div_(1.01)
        finally:
            tokenizer.padding_side = "right"
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)


def test_every_text_is_steered_to_the_vector_of_its_concept(deep, make):
    sources = {name: ConceptSources([f"About {name}."], [RETAIN[:1]]) for name in ("cyber", "bio")}
    trainer = make(deep, train_dataset=build_erasure_dataset(sources), retain_weight=0.0)
    assert list(trainer.control_vectors) == ["bio", "cyber"]
    batch = batch_of(trainer)
    hidden = trainer.hidden_states(trainer.model, {"erase": batch["forget"]})["erase"]
    expected = []
    for row, states in enumerate(hidden.split(batch["forget"]["lengths"])):
        u = trainer.control_vectors[trainer.train_dataset[row]["concept"]]
        expected.append((states - 6.5 * u).square().mean())
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


@pytest.mark.parametrize("with_lora", [False, True])
def test_layers_above_the_steered_one_are_not_run_and_the_head_is_given_no_token(with_lora, deep, make):
    trainer = make(deep, layer=2, peft_config=lora_on(0, 1, 2) if with_lora else None, max_steps=2)
    trainer.packed.texts_interact(trainer.model)  # measured once for all steps
    calls, tokens = [], []
    for index, layer in enumerate(deep.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    deep.lm_head.register_forward_hook(lambda _, args, output: tokens.append(output.numel()))

    trainer.train()

    # Two steps, each with a forward of the reference and one of the trained model.
    assert calls == [0, 1, 2] * 4
    assert tokens == [0] * 4
    assert all(p.grad is None for layer in deep.model.layers[3:] for p in layer.parameters())


@pytest.mark.parametrize("adaptive", [False, True])
def test_one_packed_forward_serves_all_texts(adaptive, deep, make):
    trainer = make(deep, adaptive=adaptive)
    real = sum(map(len, trainer.train_dataset["forget_ids"])), sum(map(len, trainer.train_dataset["retain_ids"]))
    trainer.packed.texts_interact(trainer.model)  # measured once for all steps
    widest = max(map(len, [*trainer.train_dataset["forget_ids"], *trainer.train_dataset["retain_ids"]]))
    seen = []
    deep.model.layers[0].register_forward_hook(lambda _, args, output: seen.append(args[0].shape[:2].numel()))
    trainer.compute_loss(trainer.model, batch_of(trainer))
    expected = [sum(real) if adaptive else real[1], sum(real)]
    assert all(tokens <= slots < tokens + widest for slots, tokens in zip(seen, expected, strict=True))


@pytest.mark.parametrize(("checkpointing", "reentrant"), [(False, None), (True, False), (True, True)])
@pytest.mark.parametrize("with_lora", [False, True])
def test_no_gradient_runs_below_the_first_trained_layer(with_lora, checkpointing, reentrant, deep, make):
    trainer = make(
        deep,
        peft_config=lora_on(2, 3) if with_lora else None,
        layers=[2, 3],
        max_steps=1,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant} if checkpointing else None,
    )
    reached = []

    def watch(index, output):
        if output.requires_grad:
            output.register_hook(lambda _: reached.append(index))

    for index, layer in enumerate(deep.model.layers):
        layer.register_forward_hook(lambda _, args, output, index=index: watch(index, output))
    before = trained(trainer.model)
    trainer.train()
    assert sorted(set(reached)) == [2, 3]
    moved = [name for name, p in trained(trainer.model).items() if not torch.equal(p, before[name])]
    # LoRA's A matrices get no gradient in the first step, while B is zero.
    assert moved == [name for name in before if "lora_A" not in name]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_keeps_its_structure_and_its_full_depth(fails, deep, make):
    trainer = make(deep)
    layers, names = deep.model.layers, [name for name, _ in deep.named_modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in deep.modules()]
    if fails:

        def broken(*_):
            raise RuntimeError("broken")

        handle = deep.model.layers[2].register_forward_pre_hook(broken)
        with pytest.raises(RuntimeError, match="broken"):
            trainer.compute_loss(trainer.model, batch_of(trainer))
        handle.remove()
    else:
        trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    assert deep.model.layers is layers and len(layers) == 5
    assert [name for name, _ in deep.named_modules()] == names
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in deep.modules()] == hooks
    assert len(deep(torch.tensor([[1, 2]]), output_hidden_states=True).hidden_states) == 6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_lora", [False, True])
def test_exactly_the_down_projections_move(with_lora, shape, make, tokenizer):
    model = tiny(shape, len(tokenizer))
    args = dict(layer=1, layers=[1])
    lora = rmu_lora(model, RmuConfig("unused", bf16=False, **args), rank=4) if with_lora else None
    trainer = make(model, peft_config=lora, **args)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    trainer.train()

    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    suffixes = ["lora_A.default.weight", "lora_B.default.weight"] if with_lora else ["weight"]
    expected = [f".1.{DOWN.get(shape, 'mlp.down_proj')}.{suffix}" for suffix in suffixes]
    assert len(moved) == len(expected)
    assert all(name.endswith(suffix) for name, suffix in zip(moved, expected, strict=True))


def test_by_default_the_steered_layer_and_the_two_below_are_trained(deep, make):
    trainer = make(deep)
    assert list(trained(trainer.model)) == [f"model.layers.{index}.mlp.down_proj.weight" for index in (1, 2, 3)]
    assert RmuConfig("unused", bf16=False, layer=1).layers == [0, 1]


def test_the_reference_stays_what_the_model_was(deep, make):
    original = copy.deepcopy(deep)
    trainer = make(deep)
    trainer.train()
    weights = trained(trainer.model)
    batch = {"retain": batch_of(trainer)["retain"]}
    ids, length = batch["retain"]["input_ids"], batch["retain"]["lengths"][0]

    with trainer.reference(trainer.model):
        kept = trainer.hidden_states(trainer.model, batch)["retain"][:length]
    expected = original(ids[:1, :length], output_hidden_states=True).hidden_states[4][0]

    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, weights[name]) for name, p in trained(trainer.model).items())
    assert trainer.model.training and not torch.equal(weights["model.layers.3.mlp.down_proj.weight"],
                                                      original.model.layers[3].mlp.down_proj.weight)  # fmt: skip


@pytest.mark.parametrize("with_lora", [False, True])
def test_forget_states_go_to_the_vector_while_retain_states_stay(with_lora, deep, make):
    lora = lora_on(1, 2, 3) if with_lora else None
    trainer = make(
        deep, max_steps=60, learning_rate=1e-2, steering_coefficient=2.0, retain_weight=20.0, peft_config=lora
    )
    trainer.train()
    batch = batch_of(trainer)
    with torch.no_grad(), trainer.reference(trainer.model):
        kept = trainer.hidden_states(trainer.model, batch)
    with torch.no_grad():
        states = trainer.hidden_states(trainer.model, batch)
    u = trainer.control_vectors["capitals"]
    before, after = (F.cosine_similarity(part["forget"], u, dim=-1).mean().item() for part in (kept, states))
    moved = {name: ((states[name] - kept[name]).norm() / kept[name].norm()).item() for name in states}
    assert before < 0.3 and after > before + 0.3
    assert moved["retain"] < moved["forget"] / 3


@pytest.mark.parametrize("with_lora", [False, True])
def test_bf16_autocast_trains(with_lora, deep, make):
    trainer = make(deep, bf16=True, use_cpu=True, peft_config=lora_on(3) if with_lora else None)
    before = trained(trainer.model)
    trainer.train()
    assert [name for name, p in trained(trainer.model).items() if torch.equal(p, before[name])] == []
    assert trainer.state.log_history[0]["retain_loss"] == pytest.approx(0, abs=1e-8)


def test_a_weight_of_zero_skips_the_term_and_its_forward(deep, make):
    trainer = make(deep, retain_weight=0.0, max_steps=1)
    trainer.packed.texts_interact(trainer.model)  # measured once for all steps
    calls = []
    deep.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 1 and "retain_loss" not in trainer.state.log_history[0]


def test_vectors_are_saved_and_those_of_the_checkpoint_restored(deep, make, tmp_path):
    steps = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = make(copy.deepcopy(deep), output_dir=str(tmp_path / "whole"), **steps)
    whole.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / CONTROL_VECTORS_FILE)
    assert torch.equal(saved["capitals"], whole.control_vectors["capitals"])
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoint-4"))

    other = {"capitals": -saved["capitals"]}
    save_file(other, tmp_path / "cut" / "checkpoint-2" / CONTROL_VECTORS_FILE)
    mark_finished(tmp_path / "cut" / "checkpoint-2", Launch.of(whole))
    resumed = make(copy.deepcopy(deep), output_dir=str(tmp_path / "cut"), **steps)
    assert torch.equal(resumed.control_vectors["capitals"], saved["capitals"])
    resumed.train(resume_from_checkpoint=True)

    assert torch.equal(resumed.control_vectors["capitals"], other["capitals"])


def test_a_saved_model_loads_as_a_plain_one_with_the_vectors_beside_it(deep, make, tmp_path):
    trainer = make(deep)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, deep.get_parameter(name)), name
    assert list(load_file(tmp_path / "final" / CONTROL_VECTORS_FILE)) == ["capitals"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda path: path.unlink(), FileNotFoundError, "checkpoint-1.* lacks control_vectors.safetensors"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"capitals", b"elements")), ValueError,
         r"vectors for \['elements'\], but the datasets have the concepts \['capitals'\]"),
    ],
)  # fmt: skip
def test_a_checkpoint_without_the_vectors_is_refused(change, error, message, deep, make):
    steps = dict(max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=None)
    trainer = make(deep, **(steps | dict(max_steps=1)))
    trainer.train()
    checkpoint = Path(trainer.args.output_dir) / "checkpoint-1"
    change(checkpoint / CONTROL_VECTORS_FILE)
    mark_finished(checkpoint, Launch.of(trainer))
    with pytest.raises(error, match=message):
        make(copy.deepcopy(deep), **steps).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer": -1}, "`layer` is -1: it must be at least 0"),
        ({"steering_coefficient": 0.0}, "`steering_coefficient` is 0.0: it must be above 0"),
        ({"steering_scale": -5.0}, "`steering_scale` is -5.0: it must be above 0"),
        ({"retain_weight": -1.0}, "`retain_weight` is -1.0: it must be at least 0"),
        ({"layers": [5, 8]}, r"`layers` is \[5, 8\], but the loss at `layer=7` trains layers 0 to 7"),
        ({"layers": []}, r"`layers` is \[\]"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        RmuConfig("unused", bf16=False, **fields)


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_layer_beyond_the_model_is_refused(with_lora, deep, make):
    with pytest.raises(ValueError, match="`layer` is 7, but the model has the layers 0 to 4.*would be 1"):
        make(deep, layer=7, peft_config=lora_on(0) if with_lora else None)


@pytest.mark.parametrize("trains", ["full weights", "LoRA"])
@pytest.mark.parametrize(
    ("width", "module", "message"),
    [
        (
            64,
            "mlp.w2",
            r"`target_module` is 'mlp.w2', which names no linear module of layer 1; there are \['mlp.down_proj'",
        ),
        (32, None, r"`target_module` is None, which fits \['self_attn.q_proj', .*'mlp.down_proj'\]; .*: name one"),
    ],
)
def test_a_module_that_cannot_be_found_is_refused_with_those_that_are_there(
    width, module, message, trains, make, tokenizer
):
    sizes = dict(hidden_size=32, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    with pytest.raises(ValueError, match=message):
        if trains == "LoRA":
            rmu_lora(model, RmuConfig("unused", bf16=False, layer=1, layers=[1], target_module=module))
        else:
            make(model, layer=1, layers=[1], target_module=module)


def test_a_named_module_is_trained_in_place_of_the_one_that_would_be_found(deep, make):
    trainer = make(deep, layers=[3], target_module="mlp.up_proj")
    assert list(trained(trainer.model)) == ["model.layers.3.mlp.up_proj.weight"]


def test_an_adapter_above_the_steered_layer_is_refused(deep, make, lora):
    with pytest.raises(ValueError, match=r"outside the layers 0 to 3.*layers\.4\..*`rmu_lora\(model, args\)`"):
        make(deep, peft_config=lora)


def run_steps(trainer):
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return {"losses": losses} | trained(trainer.model)


def run_steps_as_one_of_two(rank, port, output, args, dataset):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tokenizer = load_tokenizer(DEMO_MODEL)
    args = RmuConfig(**args, per_device_train_batch_size=2, output_dir=str(output / "two"))
    model = tiny("llama", len(tokenizer))
    trainer = RmuTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)
    torch.save(run_steps(trainer), output / f"{rank}.pt")


@pytest.mark.distributed
def test_two_processes_train_the_full_weights_as_one_does(make, dataset, tokenizer, tmp_path):
    args = dict(
        layer=1, max_steps=4, learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, bf16=False, use_cpu=True, gradient_checkpointing=True,
    )  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_steps_as_one_of_two, (port, tmp_path, args, dataset), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in run_steps(make(tiny("llama", len(tokenizer)), **args)).items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5)
        assert torch.equal(first[name], second[name])
