import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from elm_trainer.data.tokens import text_ids
from elm_trainer.evaluation.fluency import as_prompt, distinct_n, generate_answers, repetition
from elm_trainer.evaluation.likelihood import read_by_judge, reverse_perplexity


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
