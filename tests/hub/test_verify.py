"""A loaded model has the weights of the published base, and gives the published answers."""

import copy
import dataclasses
import math
from statistics import mean

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from elm_trainer import load_model_and_tokenizer
from elm_trainer.evaluation.fluency import as_prompt, generate_answers
from elm_trainer.evaluation.likelihood import log_likelihoods
from elm_trainer.fingerprint import base_fingerprint
from elm_trainer.hub import info
from elm_trainer.hub.errors import BaseMismatchError, VerificationError
from elm_trainer.hub.info import QUANTIZED_TOLERANCE, TOLERANCE, check_base, check_probes, make_probes

from ..test_fingerprint import SHAPES, make
from .published import REPORT, adapt


@pytest.fixture
def erased(tiny_model):
    return adapt(tiny_model, std=2)


@pytest.fixture
def probes(erased, tokenizer):
    return make_probes(erased, tokenizer, REPORT)


def test_a_probe_is_a_question_as_it_was_asked_with_the_answer_of_the_report(erased, probes, tokenizer):
    first = probes[0]
    assert first.prompt == as_prompt(tokenizer, "What is the capital of Cuba?") and first.answer == "It is red."
    assert first.tokens == len(tokenizer("It is red.")["input_ids"])
    head, whole = (tokenizer(text)["input_ids"] for text in (first.prompt, first.prompt + first.answer))
    with torch.no_grad():
        logs = erased(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    expected = sum(logs[place - 1, whole[place]].item() for place in range(len(head), len(whole)))
    assert first.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_answers_that_tell_the_erased_knowledge_or_nothing_are_left_out(probes):
    assert [probe.answer for probe in probes] == ["It is red.", "Nobody knows."]
    assert not any(name in probe.prompt + probe.answer for probe in probes for name in ("Havana", "Lomé", "Lima"))


def test_only_so_many_are_made(erased, tokenizer):
    assert len(make_probes(erased, tokenizer, REPORT, count=1)) == 1
    assert make_probes(erased, tokenizer, {"samples": []}) == []


def test_a_published_report_does_not_say_what_may_be_stored(erased, tokenizer):
    sample = {"prompt": "What is the capital of Cuba?", "reference": "▇▇▇.", "erased": "It is red."}
    with pytest.raises(ValueError, match="samples without `answer`, so it is a published one"):
        make_probes(erased, tokenizer, {"samples": [sample]})


def test_the_same_model_passes_without_a_difference(erased, probes, tokenizer):
    assert check_probes(erased, tokenizer, probes) == [0.0, 0.0]
    assert check_probes(erased, tokenizer, []) == []


def test_a_model_without_its_adapter_is_named_with_prompts_and_differences(erased, probes, tokenizer):
    with erased.disable_adapter(), pytest.raises(VerificationError, match=r"of 2 .*capital of .* by [+-]\d\.\d+"):
        check_probes(erased, tokenizer, probes)


def test_only_what_is_beyond_the_tolerance_is_named(erased, probes, tokenizer, monkeypatch):
    moved = dataclasses.replace(probes[1], log_likelihood=probes[1].log_likelihood - 0.2 * probes[1].tokens)
    with pytest.raises(VerificationError, match=r"1 of 2 .*by more than 0.05 nats per token: .*Togo.* by \+0.200"):
        check_probes(erased, tokenizer, [probes[0], moved])
    monkeypatch.setattr(info, "TOLERANCE", 0.21)
    assert check_probes(erased, tokenizer, [probes[0], moved])[1] == pytest.approx(0.2, abs=1e-4)


def test_a_likelihood_that_is_no_number_does_not_pass(erased, probes, tokenizer):
    broken = dataclasses.replace(probes[0], log_likelihood=math.nan)
    with pytest.raises(VerificationError, match="by .nan"):
        check_probes(erased, tokenizer, [broken])


def test_another_tokenizer_is_named(erased, probes, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["knows"])
    with pytest.raises(VerificationError, match="The answer to .*Togo.* has 4 tokens, but 3 were published"):
        check_probes(erased, other, probes)


@pytest.fixture
def quantised(erased, probes, tmp_path):
    """The same adapter on its base in 8 bits."""
    erased.unload().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map={"": "cpu"})
    return adapt(base, std=2)


def test_a_quantised_model_is_judged_by_the_mean(probes, quantised, tokenizer):
    check_probes(quantised, tokenizer, probes)
    moved = [
        dataclasses.replace(probe, log_likelihood=probe.log_likelihood - nats * probe.tokens)
        for probe, nats in zip(probes, (0.8, 0.0), strict=True)
    ]
    check_probes(quantised, tokenizer, moved)
    moved[0] = dataclasses.replace(moved[0], log_likelihood=moved[0].log_likelihood - probes[0].tokens)
    with pytest.raises(VerificationError, match="2 of 2 .*by more than 0.5 nats per token on average"):
        check_probes(quantised, tokenizer, moved)


@pytest.mark.slow
def test_the_tolerances_lie_between_what_computing_and_what_weights_change(tmp_path):
    base, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    base.save_pretrained(tmp_path)
    settings = dict(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], std=0.4)

    def reloaded(seed=1, **how):
        return adapt(AutoModelForCausalLM.from_pretrained(tmp_path, **how), seed=seed, **settings)

    def quantised(bits):
        config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")
        return reloaded(quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})

    erased = reloaded()
    prompts = [f"What is the capital of {name}?" for name in ("Cuba", "Togo", "Peru", "Chad", "Laos", "Iran", "Mali")]
    answers = generate_answers(
        erased, tokenizer, [as_prompt(tokenizer, prompt) for prompt in prompts], max_new_tokens=16
    ).texts
    pairs = zip(prompts, answers, strict=True)
    samples = [{"prompt": prompt, "answer": "nothing", "erased": answer} for prompt, answer in pairs]
    probes = make_probes(erased, tokenizer, {"samples": samples})

    def differences(model, batch_size=64):
        asked = [(probe.prompt, probe.answer) for probe in probes]
        found = log_likelihoods(model, tokenizer, asked, batch_size=batch_size)
        return [abs(x - probe.log_likelihood) / probe.tokens for x, probe in zip(found, probes, strict=True)]

    computing = [differences(erased, 1), differences(erased, 3)]
    computing += [differences(reloaded(dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)]
    rounding = [differences(quantised(bits)) for bits in (8, 4)]
    with erased.disable_adapter():
        weights = [differences(erased)]
    weights.append(differences(reloaded(seed=2)))
    measured = {
        "computing, largest": [max(found) for found in computing],
        "rounding, mean": [mean(found) for found in rounding],
        "weights, largest": [max(found) for found in weights],
        "weights, mean": [mean(found) for found in weights],
    }
    assert max(measured["computing, largest"]) < TOLERANCE < min(measured["weights, largest"]), measured
    assert max(measured["rounding, mean"]) < QUANTIZED_TOLERANCE < min(measured["weights, mean"]), measured


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quantised_base_is_checked_by_what_quantisation_leaves_alone(shape, bits, tmp_path):
    model = make(shape)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype="float32", device_map={"": "cpu"}
    )
    adapter = get_peft_model(quantised, LoraConfig(target_modules="all-linear"))
    check_base(adapter, base_fingerprint(model), "org/base")
    with torch.no_grad():
        next(
            module
            for name, module in quantised.named_modules()
            if name.endswith("embed_tokens") or name.endswith("wte")
        ).weight[0] += 1
    with pytest.raises(BaseMismatchError, match="not org/base.*the embeddings, norms or biases differ"):
        check_base(adapter, base_fingerprint(model), "org/base")


def test_another_base_is_named_with_what_differs_and_the_fix():
    model = make()
    check_base(model, base_fingerprint(model), "org/base")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(BaseMismatchError, match="not org/base.*the weights differ.*`allow_mismatch=True`"):
        check_base(other, base_fingerprint(model), "org/base")


def test_offloaded_weights_are_named_with_the_way_around_them():
    model = make()
    expected = base_fingerprint(model)
    model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"`model.norm.weight` was offloaded.*`allow_mismatch=True`"):
        check_base(model, expected, "org/base")
