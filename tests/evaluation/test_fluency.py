import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, MistralConfig

from elm_trainer.data.tokens import text_ids
from elm_trainer.evaluation.fluency import (
    as_prompt,
    distinct_n,
    generate_answers,
    generation_inputs,
    language_kept,
    language_of,
    repetition,
)
from elm_trainer.evaluation.likelihood import read_by_judge, reverse_perplexity
from tests.methods.methods import SHAPES, tiny


PROMPTS = ["The capital of France is", "Rome", "In Asia, the seat of government of a large country is", "Oslo"]
ANSWERS = [" Paris.", " is an old city on seven hills", "", " lies in Norway, by the sea"]


def slow_tokens(model, tokenizer, prompt, steps):
    """One prompt, no padding, no cache: the whole sequence is run again for every token."""
    ids = tokenizer(prompt)["input_ids"]
    made = []
    for _ in range(steps):
        with torch.no_grad():
            token = model(torch.tensor([ids + made])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            break
        made.append(token)
    return made


def slow_greedy(model, tokenizer, prompt, steps):
    return tokenizer.decode(slow_tokens(model, tokenizer, prompt, steps), skip_special_tokens=True)


def slow_nll(model, tokenizer, prompt, answer):
    """One answer, one forward pass per token; an empty answer is its end token."""
    ids = tokenizer(prompt)["input_ids"]
    total = 0.0
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"] or [tokenizer.eos_token_id]
    for token in tokens:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        total -= logits.log_softmax(-1)[token].item()
        ids = [*ids, token]
    return total, len(tokens)


@pytest.fixture
def sharp_model(tiny_model):
    """A random model whose choices are far from ties."""
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return tiny_model


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_batched_answers_are_those_of_a_loop_over_tokens(sharp_model, tokenizer, batch_size):
    answers = generate_answers(sharp_model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size).texts

    assert answers == [slow_greedy(sharp_model, tokenizer, prompt, 6) for prompt in PROMPTS]


def test_generating_changes_neither_training_mode_nor_padding_side_and_warns_of_nothing(tiny_model, tokenizer):
    tiny_model.train()
    tiny_model.generation_config.temperature = 0.3  # as many published models have it
    side = tokenizer.padding_side

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate_answers(tiny_model, tokenizer, PROMPTS, max_new_tokens=2)

    assert tiny_model.training
    assert tokenizer.padding_side == side


SETTINGS = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "num_beams": 3,
    "min_new_tokens": 6,
    "suppress_tokens": list(range(0, 40_000)),
    "forced_eos_token_id": 7,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "typical_p": 0.1,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "cache_implementation": "static",
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("peft", [False, True])
def test_a_models_own_generation_settings_change_no_answer(peft, temperature, sharp_model, tokenizer):
    model = get_peft_model(sharp_model, LoraConfig(task_type="CAUSAL_LM")).eval() if peft else sharp_model
    asked = {"max_new_tokens": 6, "temperature": temperature, "seed": 0}
    plain = generate_answers(model, tokenizer, PROMPTS, **asked).texts

    for name, value in SETTINGS.items():
        setattr(model.generation_config, name, value)
        assert generate_answers(model, tokenizer, PROMPTS, **asked).texts == plain, name
        assert getattr(model.generation_config, name) == value
        setattr(model.generation_config, name, None)


def test_the_model_is_put_back_into_training_mode_when_generation_fails(tiny_model, tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tiny_model, "forward", fail)
    tiny_model.train()

    with pytest.raises(RuntimeError, match="out of memory"):
        generate_answers(tiny_model, tokenizer, PROMPTS, max_new_tokens=2)

    assert tiny_model.training


def test_no_prompts_have_no_answers(tiny_model, tokenizer):
    assert generate_answers(tiny_model, tokenizer, []).texts == []


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_reverse_perplexity_agrees_with_a_loop_over_tokens(sharp_model, tokenizer, batch_size):
    nlls, tokens = reverse_perplexity(sharp_model, tokenizer, PROMPTS, ANSWERS, batch_size=batch_size)

    expected = [slow_nll(sharp_model, tokenizer, *pair) for pair in zip(PROMPTS, ANSWERS, strict=True)]
    assert tokens == [count for _, count in expected]
    assert nlls == pytest.approx([nll for nll, _ in expected], rel=1e-4)


def test_an_empty_answer_is_judged_by_its_end_token(tiny_model, tokenizer):
    nlls, tokens = reverse_perplexity(tiny_model, tokenizer, ["Question: one?"], [""])
    logits = tiny_model(**tokenizer("Question: one?", return_tensors="pt")).logits[0, -1]

    assert tokens == [1]
    assert nlls[0] == pytest.approx(-logits.log_softmax(-1)[tokenizer.eos_token_id].item(), rel=1e-4)


def test_a_question_becomes_a_chat_turn_only_where_there_is_a_template(tokenizer, monkeypatch):
    chat = as_prompt(tokenizer, "Where is Oslo?")
    monkeypatch.setattr(tokenizer, "chat_template", None)

    assert "<|im_start|>user\nWhere is Oslo?<|im_end|>" in chat
    assert chat.endswith("<|im_start|>assistant\n")
    assert as_prompt(tokenizer, "Where is Oslo?") == "Question: Where is Oslo?\nAnswer:"


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("a b", 0), ("a b c d", 0), ("a b c a b c", 1 / 4), ("a a a a a a", 3 / 4)],
)
def test_repetition_is_the_share_of_trigrams_that_came_before(text, share):
    assert repetition(text) == pytest.approx(share)


def test_distinct_bigrams_are_counted_over_all_texts():
    assert distinct_n(["a b c", "a b d"]) == pytest.approx(3 / 4)
    assert distinct_n(["a b", "c d"]) == 1
    assert distinct_n(["a", ""]) == 0


def test_an_answer_without_an_end_token_is_truncated(sharp_model, tokenizer):
    ended = [len(slow_tokens(sharp_model, tokenizer, prompt, 6)) < 6 for prompt in PROMPTS]
    # The next token of the first prompt is made an end token, so that one of the answers ends.
    first = slow_tokens(sharp_model, tokenizer, PROMPTS[0], 1)[0]
    sharp_model.generation_config.eos_token_id = [tokenizer.eos_token_id, first]

    answers = generate_answers(sharp_model, tokenizer, PROMPTS, max_new_tokens=6)

    assert not any(ended)
    expected = [first not in slow_tokens(sharp_model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert answers.truncated == expected
    assert not answers.truncated[0]


def test_a_seed_gives_the_same_answers_and_leaves_the_global_state_alone(tiny_model, tokenizer):
    options = {"max_new_tokens": 6, "temperature": 1.0}
    torch.manual_seed(5)
    state = torch.get_rng_state()

    first = generate_answers(tiny_model, tokenizer, PROMPTS, seed=1, **options).texts
    untouched = torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)

    assert untouched
    assert generate_answers(tiny_model, tokenizer, PROMPTS, seed=1, **options).texts == first
    assert generate_answers(tiny_model, tokenizer, PROMPTS, seed=2, **options).texts != first


def test_each_batch_is_drawn_with_a_seed_of_its_own(tiny_model, tokenizer):
    options = {"max_new_tokens": 6, "temperature": 1.0, "batch_size": 2}

    both = generate_answers(tiny_model, tokenizer, PROMPTS, seed=1, **options).texts

    # No batch needs to know what those before it have drawn.
    assert both[:2] == generate_answers(tiny_model, tokenizer, PROMPTS[:2], seed=1, **options).texts
    assert both[2:] == generate_answers(tiny_model, tokenizer, PROMPTS[2:], seed=2, **options).texts


def test_a_judge_reads_the_question_in_its_own_words(sharp_model, tokenizer, monkeypatch):
    questions, answers = ["Where is Oslo?", "Where is Rome?"], [" In Norway.", "\n"]
    chat = reverse_perplexity(sharp_model, tokenizer, *read_by_judge(tokenizer, questions, answers))
    expected_chat = reverse_perplexity(
        sharp_model, tokenizer, [as_prompt(tokenizer, question) for question in questions], ["In Norway.", ""]
    )
    monkeypatch.setattr(tokenizer, "chat_template", None)

    plain = reverse_perplexity(sharp_model, tokenizer, *read_by_judge(tokenizer, questions, answers))

    assert chat == expected_chat
    assert plain == reverse_perplexity(
        sharp_model, tokenizer, [f"Question: {question}\nAnswer:" for question in questions], [" In Norway.", ""]
    )
    assert plain[0] != chat[0]


def test_a_tokenizer_that_begins_every_text_itself_gets_no_second_beginning(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    begin = tokenizer.bos_token
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    plain = as_prompt(tokenizer, "Oslo?")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )

    assert plain == as_prompt(tokenizer, "Oslo?") == f"{begin}Oslo?"
    assert text_ids(tokenizer, plain).count(tokenizer.bos_token_id) == 1


def test_the_judge_is_handed_back_in_the_mode_it_came_in(tiny_model, tokenizer):
    tiny_model.train()
    reverse_perplexity(tiny_model, tokenizer, PROMPTS, ANSWERS)

    assert tiny_model.training


BEGINNING = "You answer questions about cities, in a few words."
ALIKE = [f"{BEGINNING} {end}" for end in ("Where is Oslo?", "What about the old town of Rome, then?", "And Bern")]
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
    expected = one_by_one(model, tokenizer, ALIKE, 6)
    calls = tokens_of_calls(model)

    assert generate_answers(model, tokenizer, ALIKE, max_new_tokens=6).texts == expected

    shared = len(tokenizer(BEGINNING)["input_ids"])
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in ALIKE)
    assert calls[:3] == [(1, shared), (3, longest - shared), (3, 1)]


def test_a_prompt_that_is_the_beginning_of_the_others_keeps_a_token_of_its_own(tiny_model, tokenizer):
    model = sharpened(tiny_model)
    prompts = [BEGINNING, *ALIKE]

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

    assert "past_key_values" not in generation_inputs(model, [tokenizer(text)["input_ids"] for text in ALIKE], 0, 4)
    assert generate_answers(model, tokenizer, ALIKE[:1], max_new_tokens=4).texts == one_by_one(
        model, tokenizer, ALIKE[:1], 4
    )


def test_a_learned_prompt_stands_before_all_that_is_read(tiny_model, tokenizer):
    model = get_peft_model(tiny_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()

    assert "past_key_values" not in generation_inputs(model, [tokenizer(text)["input_ids"] for text in ALIKE], 0, 4)
    assert len(generate_answers(model, tokenizer, ALIKE, max_new_tokens=2).texts) == 3


def test_no_row_gets_a_copy_of_a_frozen_head(tokenizer):
    """A product of a slice of the states, row by row, with weights that need no gradient copies these for every row."""
    model = sharpened(tiny("llama", len(tokenizer))).requires_grad_(False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        generate_answers(model, tokenizer, ALIKE, max_new_tokens=2)
    largest = [max((len(s) == 3 and s[-1] for s in event.input_shapes), default=0) for event in profiler.events()]
    products = [e.input_shapes for e, size in zip(profiler.events(), largest, strict=True) if size == len(tokenizer)]
    assert not [shapes for shapes in products if len(shapes) > 1 and shapes[1][:1] == [len(ALIKE)]]


QUESTION = "What should I see in the capital of France?"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Oslo is a nice city on the coast, with many museums.", "en"),
        ("La capitale est une belle ville", "fr"),
        ("Die Hauptstadt liegt an einem großen Fluss", "de"),
        ("La ciudad tiene muchos museos y un puerto antiguo", "es"),
        ("столица этой страны очень красива", "ru"),
        ("この国の首都はとても美しいです", "ja"),
    ],
)
def test_a_sentence_is_in_its_language(text, language):
    assert language_of(text) == language


@pytest.mark.parametrize("text", ["", "  \n", "42", "1. 2. 3.", "Paris", "Paris.", "...", "asdf qwer zxcv"])
def test_what_is_no_sentence_is_undecided(text):
    assert language_of(text) is None


def test_an_answer_in_another_language_than_its_prompt_is_not_kept():
    verdicts = language_kept(
        [QUESTION, QUESTION, QUESTION, "Paris", "Que faut-il voir dans la capitale de la France ?"],
        [
            "You should see the old town and the river, which are very beautiful.",
            "Il faut voir la vieille ville et la rivière, qui sont très belles.",
            "Paris",
            "You should see the old town and the river.",
            "Il faut voir la vieille ville et la rivière, qui sont très belles.",
        ],
    )

    assert verdicts == [True, False, None, None, True]


def test_every_prompt_wants_an_answer():
    with pytest.raises(ValueError):
        language_kept([QUESTION], [])
