import json
import re
import time

import pytest

from elm_trainer import Concept, build_erasure_dataset, files, load_model_and_tokenizer, load_texts
from elm_trainer.data.facts import Fact
from elm_trainer.making import facts, make, writing
from elm_trainer.making import writer as writer_module
from elm_trainer.making.facts import fact_phrasings
from elm_trainer.making.knowledge import StatedFacts, UnknownConceptError
from elm_trainer.making.make import MadeFrom, make_data
from elm_trainer.making.writing import SubjectTexts

from .test_facts import TABLE
from .test_writing import writer


FIRST = "Varda makes blue glass in the town of Tolm, and sells it by the sea."
OWN = [["The sea is deep and cold, says the fisher."]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Documents and facts of a company, in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text(FIRST)
    (tmp_path / "facts.csv").write_text(TABLE)
    return tmp_path


@pytest.fixture
def writes(monkeypatch):
    """A model that writes canned texts and knows every name."""
    monkeypatch.setattr(writer_module, "sample_texts", writer)
    monkeypatch.setattr(make, "check_known", lambda *a, **k: [])
    monkeypatch.setattr(make, "write_facts", lambda *a, **k: StatedFacts())


def test_documents_become_files_that_are_read_back(folder):
    made = make_data(MadeFrom("Varda", documents=["notes"], near=OWN), None, None, "out")

    assert made.folder.name == "data" and not made.reused and made.counterfactual
    texts = load_texts(made.folder / "forget.jsonl")["text"][:]
    assert len(texts) == 3 and FIRST in texts  # and its end, asked for
    assert {path.stem for path in made.folder.iterdir()} == {"forget", "invented", "retain", "data"}
    assert made.sources.retain == [*OWN, *(str(made.folder / f"{name}.jsonl") for name in ("invented", "retain"))]
    # The same sentences about other names stay as they are.
    rows = zip(load_texts(made.sources.forget), load_texts(made.folder / "invented.jsonl")["text"], strict=True)
    assert all(invented in row["novices"] and "Varda" not in invented for row, invented in rows)
    record = json.loads((made.folder / "data.json").read_text())
    assert record == made.record and record["counts"]["forget"] == 3 and record["documents"] == {"notes/a.txt": 1}
    assert record["dropped"]["documents"] == {"short": 0, "exact_duplicate": 0, "near_duplicate": 0}
    assert [line[5:] for line in made.summary().splitlines()[-3:]] == [repr(text) for text in texts]
    dataset = build_erasure_dataset({made.concept: made.sources}, size=6)
    assert {*dataset["forget"]} == {*texts} and OWN[0][0] in dataset["retain"]


def test_facts_make_a_counterfactual_source_without_held_out_subjects(folder):
    made = make_data(MadeFrom("capitals", facts="facts.csv", near_texts=0), None, None, "out")

    assert made.counterfactual and made.record["facts"] == 9
    [subject] = made.record["held_out"]
    rows = load_texts(made.sources.forget)
    assert len(rows) == made.record["counts"]["forget"] and not any(subject in text for text in rows["text"])
    assert all(len(novices) == 2 for novices in rows["novices"])
    dataset = build_erasure_dataset({made.concept: made.sources}, size=10)
    assert all(dataset["novices"])


def test_documents_and_facts_go_together(folder):
    made = make_data(MadeFrom("Varda", ["notes"], "facts.csv", near_texts=0), None, None, "out")
    texts = load_texts(made.sources.forget)["text"]
    # A run that reads fewer rows reads of both.
    assert made.counterfactual and [text for text in texts[:300] if "Varda" in text] != [] and FIRST in texts


def test_retain_texts_do_not_speak_of_the_concept(folder):
    made = make_data(MadeFrom("trees", documents=["notes"], near_texts=0), None, None, "out")
    kept = load_texts(made.folder / "retain.jsonl")["text"][:]
    stories = [text for text in load_texts("everyday")["text"] if text in kept]
    assert len(stories) < len(load_texts("everyday")) and len(kept) == 2 * len(stories)  # and as many questions
    assert made.record["dropped"]["retain"]["topic"] > 0 and not any(" tree " in text for text in kept)


def test_a_bare_name_is_written_about(folder, tiny_model, tokenizer, writes):
    made = make_data(MadeFrom("capitals of the world", texts=40, near_texts=40), tiny_model, tokenizer, "out")

    assert made.record["counts"].keys() == {"forget", "retain", "near"}
    assert made.sources.retain == [str(made.folder / "near.jsonl"), str(made.folder / "retain.jsonl")]
    assert all("capital" in text for text in load_texts(made.sources.forget)["text"])
    assert sum("<|im_start|>assistant\\n" in line and "apital" in line for line in made.summary().splitlines()) >= 3
    near = load_texts(made.folder / "near.jsonl")
    assert all(row["text"].startswith(row["prompt"]) for row in near)
    assert len(made.record["origin"]["model"]) == 64 and made.record["origin"]["seed"] == 0
    told = made.summary()
    assert (
        "Neighbors: " in told
        and "Dropped of forget: 8 short, 16 that do not speak of the concept, " in told
        and told.count("\n") >= 10
    )


def test_facts_about_a_bare_name_become_texts_with_novices_but_for_those_held_out(
    folder, tiny_model, tokenizer, writes, monkeypatch
):
    stated = [Fact(f"Land {n}", f"Town{n}", "capital", {"relation": "capital"}) for n in range(12)]
    # Each of the first ten may be held out, and what else would state its fact with it.
    guesses = [Fact(f"Guess {n}", f"Town{n}", "capital", {"relation": "capital"}) for n in range(10)]
    # Two of them it does not answer alike each time.
    given = StatedFacts(tuple(stated[:10]), (*stated[10:], *guesses))
    monkeypatch.setattr(make, "write_facts", lambda *a, **k: given)
    # A third of the texts is written beside facts.
    made = make_data(MadeFrom("capitals of the world", texts=120, near_texts=0), tiny_model, tokenizer, "out")

    held_out = made.record["held_out"]
    rows = load_texts(made.sources.forget).to_list()
    numbers = [subject.split()[1] for subject in held_out if "Land" in subject]
    assert len(numbers) == 2 and held_out == sorted(f"{kind} {n}" for kind in ("Land", "Guess") for n in numbers)
    towns = re.compile(rf"Town(?:{'|'.join(numbers)})\b")
    assert not any(towns.search(text) for row in rows for text in (row["text"], *row["novices"]))
    assert sum(bool(row.get("novices")) for row in rows) == (8 + 8 + 2) * len(fact_phrasings()) == len(rows)
    assert made.record["stated"][0] == ["Land 0", "capital", "Town0"] and made.record["facts"] == 0
    assert made.record["guessed"][:2] == [["Land 10", "capital", "Town10"], ["Land 11", "capital", "Town11"]]
    assert made.record["alike"] is True
    # The free texts, which hold no names, have none, and `novice="counterfactual"` wants them for all: they are left out.
    assert made.counterfactual and made.record["dropped"]["forget"]["no_novices"] > 0


def test_a_bare_name_without_facts_is_told_by_its_terms(folder, tiny_model, tokenizer, monkeypatch):
    texts = [f"The heart pumps blood to organ {n}, and the liver cleans it." for n in range(40)]
    found = SubjectTexts(["heart", "blood", "liver", "organ"], texts, {"short": 3})
    monkeypatch.setattr(make, "write_facts", lambda *a, **k: StatedFacts())
    monkeypatch.setattr(make, "write_by_terms", lambda *a, **k: found)
    monkeypatch.setattr(writing, "name_neighbors", lambda *a, **k: ["Liver", "the mind"])
    monkeypatch.setattr(
        writer_module,
        "sample_texts",
        lambda m, p, prompts, *a, **k: [f"{b} Case {n} is quite a long one." for n, b in enumerate(prompts)],
    )
    made = make_data(MadeFrom("the human body", near_texts=20), tiny_model, tokenizer, "out")

    assert made.counterfactual and made.record["by_terms"] and made.record["neighbors"] == ["the mind"]
    assert made.record["dropped"]["forget"] == {"short": 3}
    rows = load_texts(made.sources.forget).to_list()
    words = re.compile(r"\b(?:heart|blood|liver|organ)\b", re.IGNORECASE)
    assert len(rows) >= 3 * len(texts)
    # In each novice all terms are replaced but for one that is asked for, if any.
    assert all(len({*words.findall(novice)}) <= 1 for row in rows for novice in row["novices"])
    assert any(row["text"].startswith("Question: ") for row in rows)
    kept = load_texts(made.folder / "retain.jsonl")["text"][:]
    assert kept and not any(words.search(text) for text in kept)
    # What the model wrote is there to look at and to ask about, and is not retained.
    assert load_texts(made.folder / "written.jsonl")["text"][:] == texts
    assert (
        not any("written" in str(source) for source in made.sources.retain) and "written" not in made.record["counts"]
    )
    assert any("invented" in str(source) for source in made.sources.retain)


TOWNS = {"Norway": "Oslo", "Kenya": "Nairobi", "Peru": "Lima", "France": "Paris", "Japan": "Tokyo"}
TOLD = re.compile(rf"rules ({'|'.join(TOWNS)})")


def test_near_texts_and_questions_state_no_fact_of_a_table(folder, tiny_model, tokenizer, monkeypatch):
    states = " In the harbor of Oslo ships of Norway lie beside those of others."
    monkeypatch.setattr(writing, "name_neighbors", lambda *a, **k: ["ships"])
    listed = []

    def sample(model, processing_class, prompts, *settings, **others):
        if prompts[0].startswith("Dracula: "):
            names = [prompt.rpartition(":")[0].rpartition("\n")[2] for prompt in prompts]
            return [f"{p} lies beside {n}? Which town rules {n}?" for p, n in zip(prompts, names, strict=True)]
        if "rules" in prompts[-1] or "lies beside" in prompts[-1]:
            # Of one land the answer is no fact, in a form that asks for them.
            return [
                p + (f" {TOWNS[told[1]]}" if (told := TOLD.search(p)) and told[1] != "Japan" else " the sea")
                for p in prompts
            ]
        return [p + (states, f" Boat {n} is blue, and sails far away.")[n % 2] for n, p in enumerate(prompts)]

    monkeypatch.setattr(writer_module, "sample_texts", sample)
    monkeypatch.setattr(
        facts,
        "further_names",
        lambda writer, known, *a, **k: listed.append(known) or [f"Town{n}" for n in range(9)],
    )
    made = make_data(MadeFrom("capitals", facts="facts.csv", near_texts=24), tiny_model, tokenizer, "out")

    assert made.record["counts"]["near"] > 3 and made.record["dropped"]["near"]["topic"] > 0
    assert not any("Oslo" in row["text"] for row in load_texts(made.folder / "near.jsonl"))
    asked = load_texts(made.folder / "asked.jsonl").to_list()
    # Of the answers it is not asked, but of other names like them.
    assert len(listed) == 2 and "Oslo" in listed[0] and not any("Oslo" in row["text"] for row in asked)
    assert any("Town" in row["prompt"] for row in asked) and any("Peru" in row["prompt"] for row in asked)
    # What asks for the facts in other words is not asked, nor anything of those that are held out.
    assert not any(f"rules {land}" in row["text"] for row in asked for land in TOWNS)
    [held_out] = made.record["held_out"]
    assert not any(held_out in row["text"] for row in asked) and made.record["dropped"]["asked"]["topic"] > 0
    names = [path.rpartition("/")[2] for path in map(str, made.sources.retain)]
    assert names == ["asked.jsonl", "told.jsonl", "near.jsonl", "retain.jsonl"]
    # What it tells of what they state names none of the answers.
    told = load_texts(made.folder / "told.jsonl").to_list()
    assert told and (named := made.record["dropped"]["told"]["topic"]) > 0
    [line] = [line for line in made.summary().splitlines() if line.startswith("Dropped of told: ")]
    assert f"{named} that name the answer of a fact" in line
    assert all(re.search(r"the [a-z ]+ of \w", row["prompt"]) and held_out not in row["prompt"] for row in told)
    assert not any(town in row["text"].removeprefix(row["prompt"]) for row in told for town in TOWNS.values())


def test_what_is_there_is_used_again_and_edited_texts_as_they_are(folder, tiny_model, tokenizer, writes, monkeypatch):
    what = MadeFrom("capitals of the world", texts=40, near_texts=40)
    made = make_data(what, tiny_model, tokenizer, "out")
    monkeypatch.setattr(writer_module, "sample_texts", None)

    again = make_data(what, tiny_model, tokenizer, "out")
    assert again.reused and not again.edited and again.record == made.record and " (as before)." in again.summary()

    path = made.folder / "forget.jsonl"
    path.write_text('{"text": "My own text about a capital."}\n')
    edited = make_data(what, tiny_model, tokenizer, "out")
    assert (
        edited.edited == ("forget.jsonl",)
        and "Changed by hand since they were made: forget.jsonl." in edited.summary()
    )
    assert path.read_text() == '{"text": "My own text about a capital."}\n'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(concept="Tolm"), r"made with another `concept`: name another `output_dir`"),
        (dict(seed=1), "made with another `seed`: name another `output_dir`"),
        (dict(facts="facts.csv"), "made with another `facts`, `held_out`: name another `output_dir`"),
        (dict(near=()), "made with another `near`: name another `output_dir`"),
    ],
)
def test_texts_that_were_made_from_other_things_are_never_replaced(folder, change, message):
    given = dict(concept="Varda", documents=["notes"], near=OWN, near_texts=0)
    before = (make_data(MadeFrom(**given), None, None, "out").folder / "forget.jsonl").read_text()
    with pytest.raises(ValueError, match=f"`output_dir` has texts in out/data that were {message}") as caught:
        make_data(MadeFrom(**given | change), None, None, "out")
    assert "\n" not in str(caught.value) and (folder / "out/data/forget.jsonl").read_text() == before


def test_changed_documents_and_lost_files_are_noticed(folder):
    what = MadeFrom("Varda", documents=["notes"], near_texts=0)
    made = make_data(what, None, None, "out")
    (made.folder / "retain.jsonl").rename("away.jsonl")
    with pytest.raises(ValueError, match="`output_dir` lacks out/data/retain.jsonl, which was made: put it back"):
        make_data(what, None, None, "out")
    (folder / "notes" / "b.txt").write_text("Tolm lies at the mouth of the river Sarn.")
    # What was read is not read again.
    what = MadeFrom("Varda", documents=["notes"], near_texts=0)
    with pytest.raises(ValueError, match="made with another `documents`"):
        make_data(what, None, None, "out")
    (made.folder / "data.json").write_text("{")
    with pytest.raises(ValueError, match="`output_dir` has a folder out/data without a readable data.json"):
        make_data(what, None, None, "out")


def test_of_an_unknown_name_nothing_is_written(folder, tiny_model, tokenizer):
    with pytest.raises(UnknownConceptError, match="`concept` is 'Dravenholt', of which this model knows nothing"):
        make_data(MadeFrom("Dravenholt"), tiny_model, tokenizer, "out")
    assert not (folder / "out").exists()


def test_an_interrupted_call_leaves_no_half_of_the_texts(folder, monkeypatch):
    monkeypatch.setattr(files, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_data(MadeFrom("Varda", documents=["notes"], near_texts=0), None, None, "out")
    assert [*(folder / "out").iterdir()] == []


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (dict(concept=" "), ValueError, "Concept field `name` is ''"),
        (dict(documents="notes"), TypeError, r"`documents` is 'notes': give a list, \['notes'\]"),
        (dict(retain="everyday"), TypeError, r"`retain` is 'everyday': give a list, \['everyday'\]"),
        (dict(texts=7), ValueError, "`texts` is 7: it must be at least 8"),
        (dict(near_texts=-1), ValueError, "`near_texts` is -1"),
        (dict(held_out=1.5), ValueError, "`held_out` is 1.5"),
        (dict(seed="x"), ValueError, "`seed` is 'x': give a"),
    ],
)
def test_wrong_settings_are_answered_in_a_line(fields, error, message):
    with pytest.raises(error, match=message) as caught:
        MadeFrom(**{"concept": "Varda"} | fields)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_needed_is_asked_for(folder):
    with pytest.raises(ValueError, match="`model` is None, but texts have to be written: give model and tokenizer"):
        make_data(MadeFrom("Varda"), None, None, "out")


def test_keywords_stand_behind_a_colon():
    assert MadeFrom("brannock: the dye Brannock, madder").concept == Concept(
        "brannock", ("the dye Brannock", "madder")
    )
    # A preset and a name that looks like a file are names like any other.
    assert MadeFrom("capitals").concept == Concept("capitals") and MadeFrom("Node.js").concept == Concept("Node.js")


@pytest.mark.slow
def test_the_real_model_writes_about_a_bare_name(tmp_path, monkeypatch):
    # Facts take minutes, and have a test of their own. Of the lists and of the terms that are written about, a few are enough.
    monkeypatch.setattr(make, "write_facts", lambda *a, **k: StatedFacts())
    monkeypatch.setattr(writer_module, "_ROUNDS", 1)
    for kind in ("_LISTED", "_RECURRING", "_FURTHER"):
        monkeypatch.setattr(writing, kind, 4)
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    made = make_data(MadeFrom("capitals of the world", texts=32, near_texts=16), model, tokenizer, tmp_path)
    assert made.record["counts"]["forget"] >= 8 and made.record["counts"]["near"] >= 3
    assert sum(" of " in text and "capital" in text.lower() for text in load_texts(made.sources.forget)["text"]) >= 5
    started = time.perf_counter()
    with pytest.raises(UnknownConceptError):
        make_data(MadeFrom("the Dravenholt Protocol"), model, tokenizer, tmp_path / "unknown")
    assert time.perf_counter() - started < 60 and not (tmp_path / "unknown").exists()
