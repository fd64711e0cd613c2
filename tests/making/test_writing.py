import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from elm_trainer import Concept
from elm_trainer.making import writing
from elm_trainer.making.writing import (
    WRITING,
    ask_about,
    name_neighbors,
    sift,
    topic,
    whole_sentences,
    write_about,
    writing_prompts,
)

from ..like import byte_level


def told(prompts):
    """What a model might write: about capitals, about other things, too little, and the same again."""
    endings = [
        " Oslo is the capital number {n} of the north, and has a harbor.",
        " Bread needs flour and water and salt and time, {n} hours of it.",
        " No.",
        " The capital, as everybody says, lies far away from the sea.",
        " Once upon a time in the {n}th year a baker made bread for the whole town.",
    ]
    return [prompt + endings[n % len(endings)].format(n=n) for n, prompt in enumerate(prompts)]


def named(prompts):
    lines = [
        " rivers, Oslo, stars, the capital\n",
        " rivers, mountains, a name of far too many words\n",
        " mountains, 7, unfinis",
    ]
    return [prompt + lines[n % 3] for n, prompt in enumerate(prompts)]


def asked_and_answered(prompts):
    """Questions about a name, one of which asks for its capital in other words; and answers."""
    if not prompts[0].startswith("Dracula: "):
        return [prompt + answer_to(prompt) for prompt in prompts]
    names = [prompt.split("\n")[-1].partition(":")[0] for prompt in prompts]
    return [
        f"{prompt} grows in {name}? Why? Which town rules {name}? Which {name} is like {name}?\nmore"
        for prompt, name in zip(prompts, names, strict=True)
    ]


def answer_to(prompt):
    town = re.search(r"rules (\w+)", prompt)
    return f" {town[1]}town\nIs it" if town else "\nGrass.\n"


def writer(model, processing_class, prompts, *settings, **others):
    if not prompts:
        return []
    if prompts[0].startswith("Dracula: ") or "grows in" in prompts[0] or "rules" in prompts[0]:
        return asked_and_answered(prompts)
    return (named if "Every line names" in prompts[0] or "Shakespeare" in prompts[0] else told)(prompts)


@pytest.fixture
def canned(monkeypatch):
    monkeypatch.setattr(writing, "sample_texts", writer)


CAPITALS = Concept("capitals of the world")


@pytest.mark.parametrize(
    ("concept", "speaks", "silent"),
    [
        (CAPITALS, ["The capital is Oslo.", "Capitals!", "a capital's mayor"], ["capitalism", "the world"]),
        (Concept("chemical elements"), ["an element", "Elements"], ["a chemical reaction", "elementary school"]),
        (Concept("Harry Potter"), ["Harry ran.", "the Potters"], ["pottery", "Hermione"]),
        (Concept("the dye Brannock"), ["brannock"], ["a dye"]),
        (Concept("x", ["the dye Brannock", "madder root"]), ["Brannock's", "roots"], ["x"]),
        (Concept("C++"), ["in C we"], ["see"]),
        (Concept("王"), ["王 is"], ["a"]),
    ],
)
def test_a_text_speaks_of_a_concept_by_whole_words_of_its_topic(concept, speaks, silent):
    assert all(topic(concept).search(text) for text in speaks)
    assert not any(topic(concept).search(text) for text in silent)


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (" Oslo is cold. Rome is", " Oslo is cold."),
        (" Oslo\n- Rome\n- Ber", " Oslo\n- Rome"),
        (" no end", " no end"),
        (' She said "Oslo." And', ' She said "Oslo."'),
        ("\n\nOslo is", "\n\nOslo is"),
    ],
)
def test_what_was_cut_off_at_the_end_is_left_out(text, whole):
    assert whole_sentences(text) == whole


def test_texts_are_dropped_for_a_reason_that_is_counted():
    prompts = ["About Oslo:"] * 5
    texts = [
        " Oslo is the capital of a country in the north.",
        " Oslo is the CAPITAL of a country in the north!",
        " It is it is it is it is it is it is it is it is the capital.",
        " The capital.",
        " Bread needs flour and water and salt.",
    ]
    rows, dropped = sift(
        prompts, [p + t for p, t in zip(prompts, texts, strict=True)], lambda t: "capital" in t.lower(), WRITING
    )
    assert rows == [{"text": prompts[0] + texts[0], "prompt": prompts[0]}]
    assert dropped == {"short": 1, "repetition": 1, "topic": 1, "exact_duplicate": 1, "near_duplicate": 0}


def test_the_forget_texts_speak_of_the_concept_and_the_near_texts_do_not(tiny_model, tokenizer, canned):
    written = write_about(tiny_model, tokenizer, CAPITALS, texts=60, near_texts=40)

    behind = re.compile(r"Oslo is the capital|The capital, as everybody")
    assert len(written.forget) == 13 and all(behind.search(row["text"]) for row in written.forget)
    # Named in the prompt as an example is "stars", and cut off is the last name of a line without an end.
    assert {*written.neighbors[:2]} == {"rivers", "mountains"} and written.neighbors[2:] == ["Oslo"]
    assert written.near and not any("capital" in row["text"] for row in written.near)
    assert all(row["text"].startswith(row["prompt"]) and row["prompt"] != row["text"] for row in written.near)
    assert sum(written.dropped["forget"].values()) + len(written.forget) == 60
    assert sum(written.dropped["near"].values()) + len(written.near) == 40


LANDS = [f"Land{letter}" for letter in "abcdefgh"]


def states(text):
    return any(f"{land}town" in text for land in LANDS[:6])


def test_what_facts_name_is_asked_about_in_the_models_own_words_but_for_the_facts(tiny_model, tokenizer, canned):
    written = write_about(tiny_model, tokenizer, CAPITALS, texts=0, near_texts=20, kinds=[LANDS], speaks=states)

    assert written.asked and all(row["text"].startswith(row["prompt"]) for row in written.asked)
    # A form that names its subject twice, or none, is not asked; one whose answers state facts asks for these.
    forms = {re.sub(r"Land\w", "X", row["prompt"].rpartition("user\n")[2].partition("?")[0]) for row in written.asked}
    assert forms <= {
        f"{start}{begin} grows in X"
        for start in ("", "Question: ")
        for begin in ("What", "Where", "Which", "How", "Who", "When", "In which")
    }
    assert len(forms) == 14
    # The two lands of which no fact is known, too.
    assert not any("rules" in row["text"] for row in written.asked) and written.dropped["asked"]["topic"] == 8
    assert {row["text"].removeprefix(row["prompt"]) for row in written.asked} == {"\nGrass.\n"}
    chats = [row for row in written.asked if "<|im_start|>" in row["prompt"]]
    assert 0.2 < len(chats) / len(written.asked) < 0.4  # every third, of those that were asked


def test_questions_are_asked_of_every_kind_and_of_as_many_as_are_wanted(tiny_model, tokenizer, canned):
    kinds = [LANDS, [f"{land}x" for land in LANDS]]
    written = write_about(
        tiny_model, tokenizer, CAPITALS, texts=0, near_texts=8, kinds=kinds, speaks=lambda text: False
    )
    assert len(written.asked) == 40
    assert sum("x?" in row["prompt"] for row in written.asked) == 20
    rows, dropped = ask_about(tiny_model, tokenizer, [], WRITING, states, count=5)
    assert (rows, dropped) == ([], 0)


def test_every_form_is_asked_for_and_half_of_all_as_a_conversation(tiny_model, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(writing, "sample_texts", lambda m, t, prompts, *a, **k: asked.extend(prompts) or told(prompts))
    write_about(tiny_model, tokenizer, CAPITALS, texts=64, near_texts=0)
    forms = [prompt for some in writing_prompts()["about"].values() for prompt in some]
    filled = [form.format(name=CAPITALS.name, Name="Capitals of the world") for form in forms]
    assert all(any(form in prompt for prompt in asked) for form in filled)
    assert sum("<|im_start|>" in prompt for prompt in asked) == 32 == len(asked) / 2


def gpt2():
    tokenizer = byte_level()
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)).eval(), tokenizer


def test_models_without_a_chat_template_are_asked_questions(monkeypatch):
    model, tokenizer = gpt2()
    asked = []
    monkeypatch.setattr(writing, "sample_texts", lambda m, t, prompts, *a, **k: asked.extend(prompts) or told(prompts))
    write_about(model, tokenizer, CAPITALS, texts=60, near_texts=0)
    assert "Question: What do you know about capitals of the world?\nAnswer:" in asked


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_written_is_kept_and_too_little_is_refused(tiny_model, tokenizer, family, tmp_path):
    model, tokenizer = (tiny_model, tokenizer) if family == "llama" else gpt2()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    config = type(WRITING)(plausibility=0.0, max_new_tokens=3, batch_size=8)
    for _ in range(2):
        with pytest.raises(
            ValueError, match="Of 12 texts .* about 'capitals of the world', 0 are left .*: describe"
        ) as caught:
            write_about(
                model, tokenizer, CAPITALS, config, texts=12, near_texts=0, cache_dir=tmp_path, fingerprint="x"
            )
        assert "\n" not in str(caught.value)
    assert len(calls) == 7  # two batches of three tokens, once, and what the prompts of one begin with


def test_a_model_that_names_no_neighbor_is_no_error(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setattr(writing, "sample_texts", writer)
    monkeypatch.setattr(writing, "name_neighbors", lambda *a, **k: [])
    written = write_about(tiny_model, tokenizer, CAPITALS, texts=60, near_texts=5)
    assert written.near == [] and len(written.forget) >= 8


def test_neighbors_are_those_that_are_named_most_often(tiny_model, tokenizer, canned):
    found = name_neighbors(tiny_model, tokenizer, CAPITALS, count=2)
    assert {*found} == {"rivers", "mountains"}
