import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from elm_trainer import Concept
from elm_trainer.data.facts import Fact
from elm_trainer.making import writer as writer_module
from elm_trainer.making import writing
from elm_trainer.making.documents import whole_sentences
from elm_trainer.making.facts import ask_about, kinds_of_names
from elm_trainer.making.writer import WRITING, Writer, sift, writing_prompts
from elm_trainer.making.writing import name_neighbors, topic, write_about

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
    """A town, nothing, an answer that is cut off, one behind a blank line, or one with an end."""
    town = re.search(r"rules (\w+)", prompt)
    if town:
        return f" {town[1]}town\nIs it"
    answers = {"Where": "\n\n", "Who": " Grass and then", "When": "\n\nGrass.\nWhy"}
    return next((answer for begin, answer in answers.items() if begin in prompt), " Grass.\nWhy")


def writer(model, processing_class, prompts, *settings, **others):
    if not prompts:
        return []
    if prompts[0].startswith("Dracula: ") or "grows in" in prompts[0] or "rules" in prompts[0]:
        return asked_and_answered(prompts)
    return (named if "Every line names" in prompts[0] or "Shakespeare" in prompts[0] else told)(prompts)


@pytest.fixture
def canned(monkeypatch):
    monkeypatch.setattr(writer_module, "sample_texts", writer)


CAPITALS = Concept("capitals of the world")


@pytest.mark.parametrize(
    ("concept", "speaks", "silent"),
    [
        (CAPITALS, ["The capital is Oslo.", "Capitals!", "a capital's mayor"], ["capitalism", "the world"]),
        (Concept("chemical elements"), ["an element", "Elements"], ["a chemical reaction", "elementary school"]),
        (Concept("Harry Potter"), ["Harry ran.", "the Potters", "Harry's"], ["pottery", "Hermione"]),
        (Concept("currencies of countries"), ["a currency", "Currencies", "currency's"], ["current", "countries"]),
        (Concept("boxes"), ["a box", "Boxes", "the box's"], ["boxing"]),
        (Concept("glass"), ["glass", "Glasses"], ["glad"]),
        (Concept("toys"), ["Toys", "a toy"], ["to"]),
        (Concept("horror movies"), ["Movies", "a movie's"], ["horror", "moving"]),
        (Concept("headaches"), ["a headache", "headaches"], ["head"]),
        (Concept("Kennedy"), ["the Kennedys", "Kennedy's"], ["ken"]),
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
    written = write_about(Writer("reference", tiny_model, tokenizer), CAPITALS, texts=60, near_texts=40)

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
    written = write_about(
        Writer("reference", tiny_model, tokenizer), CAPITALS, texts=0, near_texts=20, kinds=[LANDS], speaks=states
    )

    assert written.asked and all(row["text"].startswith(row["prompt"]) for row in written.asked)
    # A form that names its subject twice, or none, is not asked; one whose answers state facts asks for these.
    forms = {re.sub(r"Land\w", "X", row["prompt"].rpartition("user\n")[2].partition("?")[0]) for row in written.asked}
    assert forms == {
        f"{start}{begin} grows in X"
        for start in ("", "Question: ")
        for begin in ("What", "Which", "How", "Who", "When", "In which")
    }
    # Of the form that asks for the facts nothing is left, the two lands of which no fact is known included; no row lacks an answer.
    assert not any("rules" in row["text"] for row in written.asked)
    assert written.dropped["asked"] == {"topic": 8, "empty": 8} and len(written.asked) == 6 * 8
    # The line ends where the model ended it.
    for row in written.asked:
        ends = {"Who": " Grass and then", "When": "\n\nGrass.\n"}
        asked = re.search(r"(\w+) grows", row["prompt"])[1]
        assert row["text"].removeprefix(row["prompt"]) == ends.get(asked, " Grass.\n")
    chats = [row for row in written.asked if "<|im_start|>" in row["prompt"]]
    assert 0.2 < len(chats) / len(written.asked) < 0.45  # every third, of those that were asked


def test_questions_are_asked_of_every_kind_and_of_as_many_as_are_wanted(tiny_model, tokenizer, canned):
    kinds = [LANDS, [f"{land}x" for land in LANDS]]
    written = write_about(
        Writer("reference", tiny_model, tokenizer),
        CAPITALS,
        texts=0,
        near_texts=8,
        kinds=kinds,
        speaks=lambda text: False,
    )
    assert len(written.asked) + written.dropped["asked"]["empty"] == 40 and written.dropped["asked"]["topic"] == 0
    assert 15 <= sum("x?" in row["prompt"] for row in written.asked) <= 20
    # What a kind with a single name cannot take is for the next one.
    written = write_about(
        Writer("reference", tiny_model, tokenizer),
        CAPITALS,
        texts=0,
        near_texts=8,
        kinds=[["Oslo"], LANDS],
        speaks=lambda text: False,
    )
    assert sum("Land" in row["prompt"] for row in written.asked) > 20


class Asks(Writer):
    """Writes the same questions about every name, and answers by a rule."""

    def __init__(self, processing_class, questions, answer=lambda prompt: " Grass."):
        super().__init__("asks", processing_class=processing_class)
        self.questions, self.answer = questions, answer

    def write(self, prompts, *, max_new_tokens=64, temperature=0.7, seed=0):
        if not prompts[0].startswith("Dracula: "):
            return [self.answer(prompt) for prompt in prompts]
        names = [prompt.rpartition("\n")[2].partition(":")[0] for prompt in prompts]
        return ["? " + self.questions.replace("NAME", name) for name in names]


@pytest.mark.parametrize(
    ("names", "count", "told", "kept"),
    [
        # Asked about few names, a form that states one fact is one that asks for it; of many names one may slip in.
        (LANDS[:3], 9, 1, 0),
        (LANDS, 40, 1, 7),
        (LANDS, 40, 2, 0),
        (LANDS, 5, 0, 5),
        ([], 5, 0, 0),
    ],
)
def test_a_form_that_asks_for_facts_is_left_out(tokenizer, names, count, told, kept):
    answer = lambda prompt: " the town" if any(land in prompt for land in LANDS[:told]) else " no idea"  # noqa: E731
    asks = Asks(tokenizer, "Which town rules NAME today?", answer)
    rows, dropped = ask_about(asks, names, lambda text: "the town" in text, count=count)
    assert len(rows) == kept and dropped["empty"] == 0
    assert dropped["topic"] == min(count, len(names)) - kept


@pytest.mark.parametrize(
    "question",
    ["Which town rules NAMEese people?", "Did Dracula ever see NAME?", "Why NAME?", "Is NAME like NAME then?"],
)
def test_forms_are_questions_with_one_whole_name_and_not_about_the_examples(tokenizer, question):
    assert ask_about(Asks(tokenizer, question), LANDS, states, count=40) == ([], {"topic": 0, "empty": 0})
    rows, _ = ask_about(Asks(tokenizer, f"{question} What grows in NAME?"), LANDS, states, count=40)
    assert len(rows) == 8 and all("What grows in Land" in row["prompt"] for row in rows)


def test_a_name_with_a_question_mark_is_asked_about_and_gives_no_forms(tokenizer):
    names = ["Who's there?", "Oslo"]
    rows, _ = ask_about(Asks(tokenizer, "What do you see in NAME today?"), names, states, count=10)
    assert sorted(re.search(r"see in (.*) today", row["prompt"])[1] for row in rows) == ["Oslo", "Who's there?"]


def test_kinds_are_subjects_and_other_names_like_the_answers(tokenizer):
    facts = [Fact(f"Land {n}", f"New Town{n}", "capital", {"relation": "capital"}) for n in range(9)]
    facts.append(Fact("Land 1", "€", "sign", {"relation": "sign"}))  # no word at all
    listed = [f"Port{n}" for n in range(8)] + ["Land 3", "Town4", "New Town5", "unfin"]

    class Lists(Writer):
        def write(self, prompts, **settings):
            return [" " + ", ".join(listed) for _ in prompts]

    subjects, others, _ = kinds_of_names(facts, frozenset({"Land 2"}), Lists("lists"))
    assert subjects == [f"Land {n}" for n in range(9) if n != 2]
    # Neither what facts name, nor a part of it: asked about it, the model would state them.
    assert sorted(others) == [f"Port{n}" for n in range(8)]
    listed[0] = "Land 4"
    assert kinds_of_names(facts, frozenset(), Lists("lists")) == [[f"Land {n}" for n in range(9)]]  # too few others


def test_every_form_is_asked_for_and_half_of_all_as_a_conversation(tiny_model, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(
        writer_module, "sample_texts", lambda m, t, prompts, *a, **k: asked.extend(prompts) or told(prompts)
    )
    write_about(Writer("reference", tiny_model, tokenizer), CAPITALS, texts=64, near_texts=0)
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
    monkeypatch.setattr(
        writer_module, "sample_texts", lambda m, t, prompts, *a, **k: asked.extend(prompts) or told(prompts)
    )
    write_about(Writer("reference", model, tokenizer), CAPITALS, texts=60, near_texts=0)
    assert "Question: What do you know about capitals of the world?\nAnswer:" in asked


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_was_written_is_kept_and_too_little_is_refused(tiny_model, tokenizer, family, tmp_path):
    model, tokenizer = (tiny_model, tokenizer) if family == "llama" else gpt2()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    reference = Writer("reference", model, tokenizer, cache_dir=tmp_path, fingerprint="x")
    config = type(WRITING)(plausibility=0.0, max_new_tokens=3, batch_size=8)
    for _ in range(2):
        with pytest.raises(
            ValueError, match="Of 12 texts .* about 'capitals of the world', 0 are left .*: describe"
        ) as caught:
            write_about(reference, CAPITALS, config, texts=12, near_texts=0)
        assert "\n" not in str(caught.value)
    assert len(calls) == 7  # two batches of three tokens, once, and what the prompts of one begin with


def test_a_model_that_names_no_neighbor_is_no_error(tiny_model, tokenizer, monkeypatch, caplog):
    monkeypatch.setattr(writer_module, "sample_texts", writer)
    monkeypatch.setattr(writing, "name_neighbors", lambda *a, **k: [])
    written = write_about(Writer("reference", tiny_model, tokenizer), CAPITALS, texts=60, near_texts=5)
    assert written.near == [] and len(written.forget) >= 8
    assert "The model names no neighbor of 'capitals of the world'" in caplog.text


def test_neighbors_are_those_that_are_named_most_often(tiny_model, tokenizer, canned):
    found = name_neighbors(Writer("reference", tiny_model, tokenizer), CAPITALS)
    assert {*found[:2]} == {"rivers", "mountains"}


def test_eight_neighbors_are_enough(tiny_model, tokenizer, monkeypatch):
    named = "rivers, lakes, seas, hills, roads, towns, farms, woods, parks, bays"

    def sample_texts(model, processing_class, prompts, *others, **more):
        return [f"{prompt} {named}\n" for prompt in prompts]

    monkeypatch.setattr(writer_module, "sample_texts", sample_texts)
    assert name_neighbors(Writer("reference", tiny_model, tokenizer), CAPITALS) == named.split(", ")[:8]
