import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, MistralConfig

from elm_trainer.evaluation.fluency import generate_answers, generation_inputs
from tests.methods.methods import SHAPES, tiny


BEGINNING = "You answer questions about cities, in a few words."
PROMPTS = [f"{BEGINNING} {end}" for end in ("Where is Oslo?", "What about the old town of Rome, then?", "And Bern")]
HEADS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# A window shorter than the prompts, positions that are not ours to choose, and no attention at all.
UNSUITED = {
    "mistral": MistralConfig(**HEADS, num_key_value_heads=2, sliding_window=8),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4),
}


def sharpened(model):
    """A random model whose choices are far from ties."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model.eval()


def tokens_of_calls(model):
    calls = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: calls.append(tuple(args[0].shape)))
    return calls


def one_by_one(model, tokenizer, prompts, steps):
    """One prompt, no padding, no cache."""
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        made = []
        while len(made) < steps and tokenizer.eos_token_id not in made:
            with torch.no_grad():
                made.append(model(torch.tensor([ids + made]), use_cache=False).logits[0, -1].argmax().item())
        answers.append(tokenizer.decode(made, skip_special_tokens=True))
    return answers


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shared_beginning_is_run_once_and_changes_no_answer(tokenizer, shape):
    model = sharpened(tiny(shape, len(tokenizer)))
    expected = one_by_one(model, tokenizer, PROMPTS, 6)
    calls = tokens_of_calls(model)

    assert generate_answers(model, tokenizer, PROMPTS, max_new_tokens=6).texts == expected

    shared = len(tokenizer(BEGINNING)["input_ids"])
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert calls[:3] == [(1, shared), (3, longest - shared), (3, 1)]


def test_a_prompt_that_is_the_beginning_of_the_others_keeps_a_token_of_its_own(tiny_model, tokenizer):
    model = sharpened(tiny_model)
    prompts = [BEGINNING, *PROMPTS]

    assert generate_answers(model, tokenizer, prompts, max_new_tokens=4).texts == one_by_one(
        model, tokenizer, prompts, 4
    )


def test_prompts_without_a_common_beginning_are_padded_on_the_left(tiny_model):
    inputs = generation_inputs(tiny_model, [[5, 6, 7], [8, 9]], 0, 4)

    assert inputs["input_ids"].tolist() == [[5, 6, 7], [0, 8, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    assert "past_key_values" not in inputs


@pytest.mark.parametrize("family", UNSUITED)
def test_models_that_it_would_not_suit_read_every_prompt_whole(tokenizer, family):
    config = UNSUITED[family]
    config.vocab_size = len(tokenizer)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    model = sharpened(AutoModelForCausalLM.from_config(config))

    assert "past_key_values" not in generation_inputs(model, [tokenizer(text)["input_ids"] for text in PROMPTS], 0, 4)
    assert generate_answers(model, tokenizer, PROMPTS[:1], max_new_tokens=4).texts == one_by_one(
        model, tokenizer, PROMPTS[:1], 4
    )


def test_a_learned_prompt_stands_before_all_that_is_read(tiny_model, tokenizer):
    model = get_peft_model(tiny_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()

    assert "past_key_values" not in generation_inputs(model, [tokenizer(text)["input_ids"] for text in PROMPTS], 0, 4)
    assert len(generate_answers(model, tokenizer, PROMPTS, max_new_tokens=2).texts) == 3


def test_no_row_gets_a_copy_of_a_frozen_head(tokenizer):
    """A product of a slice of the states, row by row, with weights that need no gradient copies these for every row."""
    model = sharpened(tiny("llama", len(tokenizer))).requires_grad_(False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        generate_answers(model, tokenizer, PROMPTS, max_new_tokens=2)
    largest = [max((len(s) == 3 and s[-1] for s in event.input_shapes), default=0) for event in profiler.events()]
    products = [e.input_shapes for e, size in zip(profiler.events(), largest, strict=True) if size == len(tokenizer)]
    assert not [shapes for shapes in products if len(shapes) > 1 and shapes[1][:1] == [len(PROMPTS)]]
