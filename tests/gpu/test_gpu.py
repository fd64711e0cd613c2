"""What a card does otherwise than a CPU: its precision, its own memory, and that the host must not wait for it in a step."""

import math
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import elm_trainer
from elm_trainer import SynthesisConfig, load_concept, load_erased, synthesize_completions
from elm_trainer.modeling import is_bitsandbytes_available

from ..methods.methods import METHODS, tiny, trained


PACKAGE = str(Path(elm_trainer.__file__).parent)
TORCH = str(Path(torch.__file__).parent)


def batch_of(trainer):
    """The collated batch of the first training rows, where the model is trained."""
    trainer.model.to(trainer.args.device)
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in range(3)]))


def gradient(trainer, batch):
    """Loss of a batch, and its gradient by all trained weights as one vector."""
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, batch)
    parts = torch.autograd.grad(loss, [p for p in trainer.model.parameters() if p.requires_grad])
    return loss.item(), torch.cat([part.flatten().double().cpu() for part in parts])


def test_a_step_in_bf16_is_that_of_a_cpu_in_float32(make, tokenizer, device):
    reference = make(on="cpu", precompute_targets=True)
    collated = reference.data_collator([reference.train_dataset[row] for row in range(3)])
    expected, direction = gradient(reference, collated)
    half = make(model=tiny("llama", len(tokenizer)).to(torch.bfloat16), bf16=True, precompute_targets=False)
    half.model.to(device)
    found, own = gradient(half, half._prepare_inputs(collated))

    assert half.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert found == pytest.approx(expected, rel=1e-2)
    assert direction.norm() > 0
    assert torch.cosine_similarity(own, direction, dim=0) > 0.99
    assert own.norm().item() == pytest.approx(direction.norm().item(), rel=0.05)


@pytest.mark.parametrize("retain_loss", ["kl", "argmax", "log"])
def test_stored_targets_are_those_that_a_step_makes(make, retain_loss):
    stored, live = (make(precompute_targets=precompute, retain_loss=retain_loss) for precompute in (True, False))
    assert "target" in (batch := batch_of(stored))["forget"]
    expected, direction = gradient(live, batch_of(live))
    found, own = gradient(stored, batch)
    # Stored probabilities have three bytes, and at η = 500 a target is as exact as five hundred times its logits.
    assert found == pytest.approx(expected, rel=1e-3)
    assert torch.cosine_similarity(own, direction, dim=0) > 0.999
    assert own.norm().item() == pytest.approx(direction.norm().item(), rel=1e-2)


WAITING = {
    "_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero", "unique_consecutive",
    "unique_dim", "_unique2",
}  # fmt: skip


def tensors(values):
    """The tensors in something nested, which hold anything."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.numel()]


class Waits(TorchDispatchMode):
    """Notes operations for which the host would have to wait if what is given lay on a card, with what is brought to its
    device and what is made of all that.
    """

    def __init__(self, given, note):
        super().__init__()
        self._note, self._storages, self._to = note, {}, torch.Tensor.to
        self._add(given)

    def _add(self, values):
        # Kept, so that no other takes its place in memory.
        self._storages |= {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors(values)}

    def _knows(self, tensor):
        return tensor.untyped_storage().data_ptr() in self._storages

    def __enter__(self):
        def to(tensor, *args, **kwargs):
            moved = self._to(tensor, *args, **kwargs)
            if "device" in kwargs or any(isinstance(value, (str, torch.device)) for value in args):
                if tensors(moved) and not self._knows(tensor) and not kwargs.get("non_blocking"):
                    self._note()
                self._add([moved])
            return moved

        torch.Tensor.to = to
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.to = self._to
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        taken = [tensor for tensor in tensors((args, kwargs)) if self._knows(tensor)]
        if taken:
            name = func.overloadpacket.__name__
            mask = name in ("index", "index_put", "index_put_") and any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            )
            counted = func is torch.ops.aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
            if name in WAITING or mask or counted:
                self._note()
        made = func(*args, **(kwargs or {}))
        if taken:
            self._add(made)
        return made


@contextmanager
def host_waits(device, given):
    """Lists the places, in files other than PyTorch's, where the host waits for what was `given` to the device."""
    places = []

    def note(message="", *_, **__):
        if message and "synchroniz" not in str(message):
            return  # a warning of another kind
        frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.startswith(TORCH)]
        frames = [frame for frame in frames if frame.filename not in (__file__, warnings.__file__)]
        places.append(f"{frames[-1].filename}:{frames[-1].lineno}")

    if device == "cpu":
        with Waits(given, note):
            yield places
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        # Called where the operation is, so that its place can be read from the stack.
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_wait_is_noticed(device):
    values = torch.arange(4.0, device=device)
    with host_waits(device, [values]) as places:
        (values * 2).sum()
        assert places == []
        host = torch.arange(4.0)
        assert places == []
        waiting = (
            (values + 1).max().item,
            (values > 1).nonzero,
            lambda: values[values > 2],
            lambda: host.to(values.device),
        )
        for wait in waiting:
            wait()
    # This file is left out of the places, so that what called the test stands there.
    assert len(places) >= 4


@pytest.mark.parametrize("name", METHODS)
def test_the_host_waits_for_no_operation_of_ours_in_a_step(make, name, device):
    method = METHODS[name]
    fields = {"precompute_targets": True} if name == "elm" else {}
    trainer = make(method.trainer, method.config, **method.fields, **fields)
    batch = batch_of(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()  # what is measured once is
    given = [*trainer.model.parameters(), *trainer.model.buffers(), *tensors(dict(batch))]
    with host_waits(device, given) as places:
        trainer.compute_loss(trainer.model, batch).backward()
    # transformers asks once a forward whether there are several texts in a row.
    assert [place for place in places if place.startswith(PACKAGE)] == []


@pytest.mark.parametrize("name", ["elm", "npo", "rmu"])
def test_a_method_trains_in_bf16(make, name, tokenizer, device):
    method = METHODS[name]
    trainer = make(
        method.trainer,
        method.config,
        model=tiny("llama", len(tokenizer)).to(torch.bfloat16),
        bf16=True,
        **method.fields,
    )
    before = trained(trainer.model)
    trainer.train()

    assert next(trainer.model.parameters()).device.type == device
    for entry in trainer.state.log_history[:2]:
        assert all(math.isfinite(entry[f"{term}_loss"]) for term in method.terms)
    after = trained(trainer.model)
    # The layers above the one that RMU steers are not run.
    moved = [name for name, weight in after.items() if not torch.equal(weight.cpu(), before[name].cpu())]
    assert len(moved) == len(after)


def test_an_adapter_trains_on_a_base_of_four_bits(make, tokenizer, tmp_path, device):
    if not is_bitsandbytes_available():
        pytest.skip("bitsandbytes, which quantizes, is not installed")
    torch.manual_seed(0)
    # Blocks of four-bit weights hold 64 of one row.
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "base")
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=four_bits, device_map={"": 0 if device == "cuda" else "cpu"}
    )
    trainer = make(model=model, precompute_targets=True)
    before = trained(trainer.model)
    trainer.train()

    assert any(type(weight).__name__ == "Params4bit" for weight in trainer.model.parameters())
    assert math.isfinite(trainer.state.log_history[0]["erase_loss"])
    assert [key for key, weight in trained(trainer.model).items() if torch.equal(weight, before[key])] == []


def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(make, tmp_path, device):
    whole = make(max_steps=3, save_strategy="steps", save_steps=1)
    whole.train()
    resumed = make(max_steps=3, save_strategy="steps", save_steps=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

    assert resumed.state.global_step == 3
    expected = trained(whole.model)
    for name, weight in trained(resumed.model).items():
        # A card may add in another order each time.
        assert (weight - expected[name]).norm() <= (0 if device == "cpu" else 1e-2) * expected[name].norm()


def test_an_adapter_is_loaded_onto_the_device(make, tokenizer, tmp_path, device):
    trainer = make()
    trainer.model.to(device)
    tiny("llama", len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer.save_model(str(tmp_path / "adapter"))
    model, _ = load_erased(tmp_path / "adapter", base_model=str(tmp_path / "base"), device_map={"": device})

    assert {parameter.device.type for parameter in model.parameters()} == {device}
    tokens = torch.tensor([tokenizer("The capital of Norway is")["input_ids"]], device=device)
    with torch.no_grad():
        expected, found = (each.eval()(input_ids=tokens).logits for each in (trainer.model, model))
        with model.disable_adapter():
            base = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - base).abs().max() > 1e-2, "the adapter changes nothing"


def test_text_is_written_on_the_device(make, tokenizer, device):
    model = make().model.to(device).eval()
    prompts = ["The capital of Norway is", "Bread needs"]
    settings = SynthesisConfig(max_new_tokens=6, min_words=1, max_repetition=1.0, seed=3)
    first, again = (
        synthesize_completions(model, tokenizer, prompts, load_concept("capitals"), settings).pairs for _ in range(2)
    )
    assert first == again
    assert [prompt for prompt, _ in first] == prompts
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(device)
    written = model.generate(**encoded, max_new_tokens=4, do_sample=False)
    assert written.device.type == device and written.shape[1] == encoded["input_ids"].shape[1] + 4
