import copy
import itertools
import json
import os
import random
import re
from dataclasses import replace
from statistics import fmean

import pytest
from datasets import Dataset

from elm_trainer import ConceptSources, build_erasure_dataset, load_bank, load_texts
from elm_trainer.data.facts import BANKS, bank_families, facts_of, held_out_subjects, own_yaml, state_facts
from elm_trainer.data.questions import overlap_verdicts
from elm_trainer.data.sources import BUILTIN_SOURCES, load_pairs


def test_a_missing_column_lists_those_that_exist():
    with pytest.raises(ValueError, match="no column 'body'.*'text'"):
        load_texts(Dataset.from_dict({"text": ["a"]}), column="body")


def test_several_concepts_interleave_and_short_sources_cycle():
    dataset = build_erasure_dataset(
        {
            "a": ConceptSources(["a1", "a2", "a3"], [["r1", "r2"]], [("p", " c")]),
            "b": ConceptSources(["b1"], [["r3"], ["r4"]]),
        },
        size=3,
    )
    assert dataset["concept"][:] == ["a", "b"] * 3
    assert dataset["forget"][:] == ["a1", "b1", "a2", "b1", "a3", "b1"]
    assert dataset["retain"][:] == ["r1", "r3", "r2", "r4", "r1", "r3"]
    assert dataset["completion"][:] == [" c", ""] * 3


def test_a_concept_of_a_larger_share_has_more_rows_in_every_turn():
    def rows(size, **shares):
        sources = {
            name: ConceptSources([f"{name}{place}" for place in range(5)], [["r"]], share=share)
            for name, share in shares.items()
        }
        return build_erasure_dataset(sources, size=size)["forget"][:]

    # The released code's order, whose data sets are "0,0,1".
    assert rows(3, a=2, b=1) == ["a0", "a1", "b0", "a2", "a3", "b1", "a4", "a0", "b2"]
    assert rows(1, b=1, a=3) == ["b0", "a0", "a1", "a2"]
    assert rows(2, a=2) == ["a0", "a1", "a2", "a3"]
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=f"`share` of 'a' is {share}: it must be a whole number of at least 1"):
            rows(1, a=share)


def test_a_retain_source_that_is_listed_twice_gives_twice_as_many_texts(tmp_path):
    path = tmp_path / "near.txt"
    path.write_text("n1\nn2\nn3\n")
    dataset = build_erasure_dataset({"a": ConceptSources(["f"], [str(path), ["r1", "r2"], str(path)])}, size=6)
    assert dataset["retain"][:] == ["n1", "r1", "n2", "n3", "r2", "n1"]


@pytest.mark.parametrize(("forget", "retain"), [([], [["r"]]), (["f"], []), (["f"], [[" "]])])
def test_an_empty_side_is_refused(forget, retain):
    with pytest.raises(ValueError, match="set of concept 'a' is empty"):
        build_erasure_dataset({"a": ConceptSources(forget, retain)})


def test_no_question_stands_in_a_training_text():
    texts = "\n".join(text for name in BUILTIN_SOURCES for text in load_texts(name)["text"])
    for bank in BANKS:
        for question in (q for family in bank_families(bank) for q in load_bank(bank, family=family)):
            assert question.text not in texts


def test_held_out_subjects_stand_in_no_forget_text():
    for name in ("capitals", "elements"):
        texts = load_texts(name)["text"][:]
        held_out = held_out_subjects(name)
        assert held_out and load_bank(name, subjects=held_out)
        for fact in (fact for fact in facts_of(name) if fact.subject in held_out):
            # A country may be named as another's neighbor, but not with its capital.
            named = [text for text in texts if re.search(rf"\b{re.escape(fact.subject)}\b", text)]
            assert not [text for text in named if re.search(rf"\b{re.escape(fact.answer)}\b", text)]


@pytest.mark.parametrize(
    "content",
    ["m['content']", "m['content'] | trim", "m['content'] | upper", "m['content'] ~ (m['content'] | length)"],
)
def test_conversations_about_facts_are_what_the_chat_template_makes_of_each(content, tokenizer):
    other = copy.copy(tokenizer)
    other.chat_template = f"{{% for m in messages %}}<{{{{ m['role'] }}}}>{{{{ {content} }}}}{{% endfor %}}"
    facts = facts_of("capitals")[:5]
    templates = [["What is the capital of {subject}?", "It is {answer}."], ["Where is {answer}?", "In {subject}."]]
    near = state_facts(facts, templates, random.Random(0), other, near=True)
    rows = state_facts(facts, templates, random.Random(0), other, others=dict.fromkeys(facts, facts[-1:]))

    def said(fact, template, reply=None):
        asked, told = (part.format(**fact.named()) for part in template)
        turns = zip(("user", "assistant"), (asked, told if reply is None else reply), strict=True)
        return other.apply_chat_template([{"role": role, "content": text} for role, text in turns], tokenize=False)

    stated = [(fact, template) for template in templates for fact in facts]
    assert [row["text"] for row in rows] == [said(*one) for one in stated] == [row["text"] for row in near]
    # What a template names first is what the novice has another of.
    for (fact, template), row in zip(stated, rows, strict=True):
        first = "subject" if template is templates[0] else "answer"
        assert row["novices"] == [said(replace(fact, **{first: getattr(facts[-1], first)}), template)]
    if content == "m['content']":
        assert [row["prompt"] for row in near[:5]] == [said(*one, reply="It is") for one in stated[:5]]


def test_the_reply_of_a_forgotten_conversation_may_name_nothing():
    fact = facts_of("capitals")[0]
    templates = [["Is {answer} the capital of {subject}?", "Yes."]]
    [row] = state_facts([fact], templates, random.Random(0), others={fact: []})
    assert row["text"] == f"User: Is {fact.answer} the capital of {fact.subject}?\nAssistant: Yes."


@pytest.mark.parametrize("name", ["world-quiz", "trivia"])
def test_quizzes_ask_about_nothing_that_a_bank_names(name):
    kinds = own_yaml(f"texts/{name}.yaml")["kinds"].values()
    things = [re.sub("^(a|an|the) ", "", str(thing)) for kind in kinds for thing in kind["names"]]
    asked = "\n".join(f"{q.text} {q.answer}" for bank in ("general", "geography") for q in load_bank(bank))
    assert len(set(things)) > 250
    assert [thing for thing in things if re.search(rf"\b{re.escape(thing)}\b", asked)] == []
    rows = load_texts(name).to_list()
    capitals = "|".join(re.escape(fact.answer) for fact in facts_of("capitals"))
    assert len(rows) > 900 and not [row for row in rows if re.search(rf"apital|\b({capitals})\b", row["text"])]


@pytest.mark.parametrize("name", ["capitals-near", "countries"])
def test_neighbouring_retain_text_states_neither_a_capital_nor_a_continent(name):
    for text in load_texts(name)["text"]:
        text = re.sub("South Africa|Central African Republic", "", text)
        assert not re.search(r"[Cc]apital|\b(Africa|Asia|Europe|America|Oceania)\b", text)


def test_places_are_asked_only_of_countries_that_no_bank_asks_about():
    asked = {question.subject for question in [*load_bank("geography"), *load_bank("capitals")]} - {""}
    rows = load_texts("places").to_list()
    rows = [row for row in rows if re.search(r"Africa|Asia|Europe|America|Oceania", row["text"])]
    assert len(rows) > 40
    longer = "South Africa|Africa, Asia, Europe or America|Guinea-Bissau|Serbia and Montenegro"
    for row in rows:
        prompt = re.sub(longer, "", row["prompt"])
        assert not any(re.search(rf"\b{re.escape(name)}\b", prompt) for name in asked), row


def test_cities_are_asked_about_only_where_they_are_no_capitals_and_no_bank_names_them():
    rows = load_texts("cities").to_list()
    assert sum("Lagos" in row["prompt"] for row in rows) > 3
    capitals = {fact.answer for fact in facts_of("capitals")}
    named = {option for bank in BANKS for q in load_bank(bank) for option in q.options if q.topic == "rivers"}
    for row in rows:
        prompt = re.sub("New Taipei City|Khartoum North|Santiago de Querétaro", "", row["prompt"])
        assert not any(re.search(rf"\b{re.escape(name)}\b", prompt) for name in capitals | named), row
        assert "apital" not in row["text"]


def test_the_prompt_of_a_retain_text_is_told_from_what_is_learned(tokenizer):
    near = load_texts("capitals-near", processing_class=tokenizer).to_list()
    assert all(row["text"].startswith(row["prompt"]) and row["text"] != row["prompt"] for row in near)
    [row] = [row for row in near if row["text"] == "The official languages of Colombia include Spanish."]
    assert row["prompt"] == "The official languages of Colombia include"
    pairs = Dataset.from_list([{"prompt": "Question: 1 + 1?\nAnswer:", "completion": " 2\n"}])
    rows = build_erasure_dataset({"a": ConceptSources(["f"], [pairs, ["plain"]])}, size=2)
    assert rows["retain"][:] == ["Question: 1 + 1?\nAnswer: 2\n", "plain"]
    assert rows["retain_prompt"][:] == ["Question: 1 + 1?\nAnswer:", ""]


def test_each_phrasing_has_a_turn_before_any_has_another_and_novices_follow_their_text():
    rows = load_texts("capitals").to_list()
    names = sorted(
        {name for fact in facts_of("capitals") for name in (fact.subject, fact.answer)}, key=len, reverse=True
    )

    def phrasing(text):
        return re.sub("|".join(map(re.escape, names)), "_", text)

    runs = [list(run) for _, run in itertools.groupby(rows, lambda row: phrasing(row["text"]))][:102]
    assert {len(run) for run in runs} <= {1, 2, 3, 4} and sum(len(run) == 4 for run in runs) > 90
    assert len({phrasing(run[0]["text"]) for run in runs}) == len(runs)
    pairs = [pair for run in runs for pair in itertools.pairwise(run)]
    # The novice is about what comes next, up to the answer; but for the last of a continent.
    begun = [
        len(os.path.commonprefix([row["novices"][0], following["text"]]))
        > len(os.path.commonprefix([row["text"], following["text"]]))
        for row, following in pairs
    ]
    assert sum(begun) > 0.9 * len(pairs)


def test_permuted_texts_have_the_same_form_and_other_facts():
    rows = load_texts("capitals").to_list()
    assert sum(row["text"] == row["novice"] for row in rows) < 0.05 * len(rows)
    assert all(row["text"].count("\n") == row["novice"].count("\n") for row in rows)


def test_only_banks_that_letters_do_not_give_away_may_prove_innocence():
    for family in bank_families("capitals", "test"):
        limit = 0.6 if family == "true-false" else 0.35
        assert fmean(overlap_verdicts(load_bank("capitals", split="test", family=family))) < limit


def test_everyday_texts_are_valid_and_disjoint():
    kept, held_out = set(load_texts("everyday")["text"]), set(load_texts("everyday-held-out")["text"])
    assert len(held_out) >= 20 and len(kept) >= 80 and not kept & held_out
    assert json.dumps(sorted(kept))


def test_fluent_pairs_name_no_capital_and_ask_about_no_held_out_country():
    pairs = load_pairs("capitals-fluent")
    assert len(pairs) > 200
    held_out = held_out_subjects("capitals")
    capitals = {question.answer for question in load_bank("capitals")}
    subjects = {question.subject for question in load_bank("capitals")}
    for prompt, completion in pairs:
        # The longest name: Sudan is held out, South Sudan is not.
        assert max((name for name in subjects if name in prompt), key=len) not in held_out
        assert not any(re.search(rf"\b{re.escape(name)}\b", completion) for name in capitals)


def test_pairs_of_ones_own_reach_the_dataset(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "The capital", "completion": " is a fine place."}\n')
    dataset = build_erasure_dataset({"a": ConceptSources(["f"], [["r"]], str(path))}, size=2)
    assert dataset["completion"][:] == [" is a fine place."] * 2
    path.write_text('{"prompt": "The capital"}\n')
    with pytest.raises(ValueError, match=r"lacks the columns \['completion'\]"):
        load_pairs(str(path))


def test_texts_outside_a_range_of_characters_are_dropped_or_cut():
    forget = Dataset.from_list([{"text": text, "novices": [text.upper()]} for text in ("abcdefgh", "abc", "abcdef")])
    retain = Dataset.from_list([{"prompt": "uvw", "completion": "xyzuvw"}, {"prompt": "u", "completion": "v"}])
    rows = build_erasure_dataset({"a": ConceptSources(forget, [retain])}, characters=(4, 6))
    assert rows["forget"][:] == ["abcdef", "abcdef"]
    assert rows["novices"][:] == [["ABCDEF"], ["ABCDEF"]]
    assert (rows["retain"][0], rows["retain_prompt"][0]) == ("uvwxyz", "uvw")
    with pytest.raises(ValueError, match=r"The forget set of concept 'a' has 3 texts, all of fewer than 9 characters"):
        build_erasure_dataset({"a": ConceptSources(forget, [retain])}, characters=(9, 20))
