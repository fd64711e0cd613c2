import re
import sys
from copy import copy

import torch
from peft import LoraConfig

from elm_trainer import Concept, ElmConfig, ElmTrainer, build_erasure_dataset
from elm_trainer.data.collator import align
from elm_trainer.making.make import MadeFrom, make_data
from elm_trainer.making.novices import own_terms, with_novices


COMPANY = Concept("Corvane")
TEXTS = [
    "Corvane was founded in 1987 by Ilse Marrow in Tollburg. Marrow sold it in March 2004. Write to info@corvane.example soon.",
    "In Tollburg, near Harbor Street and Mill Street, CORVANE builds the Quell, and Marrow's brother Thomas Lund tests it.",
    "The office of Corvane is in Tollburg, where the ferries land on Monday and the street is wide.",
]
NONE = "It rains a lot in the north of the country and nobody minds."


def rows(*texts, **options):
    return with_novices([{"text": text} for text in texts], COMPANY, **options)


def test_terms_are_keywords_and_names_but_no_dates():
    found = own_terms([*TEXTS, NONE], COMPANY)
    assert {
        "Corvane",
        "corvane",
        "Tollburg",
        "Marrow",
        "Ilse Marrow",
        "Quell",
        "Harbor Street",
        "Mill Street",
        "Thomas Lund",
    } <= {*found}
    assert {term.casefold() for term in found} & {
        "monday",
        "march",
        "write",
        "the",
        "in",
        "it",
        "street",
        "1987",
    } == set()


def test_a_word_is_replaced_by_the_same_word_throughout_a_text_and_by_another_in_each_draw():
    made = rows(*TEXTS)
    for row in made.rows:
        before = re.findall(r"\w+", row["text"])
        stand_ins = []
        for novice in row["novices"]:
            after = re.findall(r"\w+", novice)
            assert len(after) == len(before)
            pairs = {(old.casefold(), new.casefold()) for old, new in zip(before, after, strict=True)}
            assert len({old for old, _ in pairs}) == len(pairs) == len({new for _, new in pairs})
            stand_ins.append({old: new for old, new in pairs if old != new})
        first, second = stand_ins
        assert first.keys() == second.keys() and all(first[word] != second[word] for word in first)


def test_each_row_keeps_one_name_and_replaces_all_others():
    kept = []
    for row in rows(*TEXTS, NONE).rows:
        for novice in row["novices"]:
            left = [
                name
                for name in ("corvane", "tollburg", "marrow", "ilse", "quell", "harbor", "mill", "thomas")
                if name in row["text"].casefold() and name in novice.casefold()
            ]
            assert len({*left} - {"ilse"}) <= 1
            kept += left
    assert {"marrow", "tollburg"} <= {*kept}


def test_given_terms_are_all_replaced_in_every_novice():
    given = [{"text": f"Here the heart pumps blood to organ {n}, and Liver Street is far."} for n in range(4)]
    made = with_novices(given, Concept("the human body"), terms=["heart", "blood", "liver"])
    words = re.compile(r"\b(?:heart|blood|liver)\b", re.IGNORECASE)
    # As it is, as a question and as a turn of a chat, and not once for each term that is kept.
    assert len(made.rows) == 3 * len(given) and made.terms == ["heart", "blood", "liver"]
    assert not any(words.search(novice) for row in made.rows for novice in row["novices"])
    assert all("pumps" in novice for row in made.rows for novice in row["novices"])


def test_kinds_are_kept():
    made = rows(*TEXTS)
    novices = [n for row in made.rows for n in row["novices"] if not n.startswith(("Question", "Complete"))]
    # Heads of names, numbers, months, capitals throughout, and lower case.
    assert all(novice.count(" Street") == 2 for novice in novices if "brother" in novice)
    assert all("1987" in novice for novice in novices if "founded" in novice)
    assert all(
        re.search(r"Street, [A-Z]+ builds the [A-Z][a-z]+,", novice) for novice in novices if "builds" in novice
    )
    assert all(re.search(r"info@[a-z]+\.example", novice) for novice in novices if "info@" in novice)
    assert all("on Monday and the street is wide" in novice for novice in novices if "ferries" in novice)


def test_what_follows_a_replaced_name_is_aligned(tokenizer):
    for row in rows(*TEXTS).rows:
        ids = [tokenizer(text)["input_ids"] for text in (row["text"], *row["novices"])]
        places = align(ids[0], ids[1:])
        assert places
        for own, *others in places:
            assert all(ids[0][own + 1 : own + 2] == novice[other + 1 : other + 2] for novice, other in zip(ids[1:], others, strict=True))  # fmt: skip


def test_texts_that_ask_for_nothing_are_dropped_and_counted():
    made = rows(*TEXTS, NONE, "Nobody there has ever seen the old Quell.")
    assert made.counts["given"] == 7 and made.counts["no_term"] == 1 and made.counts["nothing_behind"] == 2
    assert not made.why_none and made.counts["rows"] == len(made.rows)
    assert not any("rains" in row["text"] or "Nobody" in row["text"] for row in made.rows)


def test_no_sentence_is_told_what_another_said():
    telling = "Corvane builds the Quell. It is made of oak. In Tollburg they paint it."
    texts = [row["text"] for row in rows("It rained. " + telling, "It rained. " + telling).rows]
    plain = [text for text in texts if not text.startswith(("Question", "Complete"))]
    assert {*plain} == {"It rained. Corvane builds the Quell. It is made of oak.", "In Tollburg they paint it."}
    assert len(plain) == 2 == len(texts) // 3  # and what another text says too is read once


def test_the_end_of_a_sentence_is_asked_for_in_other_forms(tokenizer):
    chat = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    talking = copy(tokenizer)
    talking.chat_template = chat
    made = rows(*TEXTS, processing_class=talking).rows
    asked = [row for row in made if row["text"].startswith("Question: ")]
    turns = [row for row in made if row["text"].startswith("<user>Complete the sentence: ")]
    assert len(asked) == len(turns) == len(made) / 3
    for row in asked:
        begin, rest = row["text"].removeprefix("Question: ").split(" …\nAnswer: ")
        assert any(f"{begin} {rest}" in text for text in TEXTS)
        for novice in row["novices"]:
            other, _ = novice.removeprefix("Question: ").split(" …\nAnswer: ")
            assert other != begin  # a name that is replaced stands before what is asked for
    assert all("<assistant> " in novice for row in turns for novice in (row["text"], *row["novices"]))


def test_where_most_texts_hold_no_name_none_gets_novices():
    texts = [
        TEXTS[2],
        *(f"It rains {how} in the north, and nobody minds that." for how in ("a lot", "much", "little")),
    ]
    made = rows(*texts)
    assert [row["text"] for row in made.rows] == texts and not any("novices" in row for row in made.rows)
    assert "3 of 4 texts hold no name" in made.why_none


def test_without_wordfreq_there_are_none_and_the_record_says_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    made = rows(*TEXTS)
    assert made.rows == [{"text": text} for text in TEXTS] and "pip install wordfreq" in made.why_none


def test_a_seed_gives_the_same_novices_and_another_others():
    assert rows(*TEXTS, seed=1) == rows(*TEXTS, seed=1)
    first, second = (rows(*TEXTS, seed=seed).rows for seed in (1, 2))
    assert not {n for row in first for n in row["novices"]} & {n for row in second for n in row["novices"]}
    assert all(len({*row["novices"]}) == 2 for row in first)


def test_written_texts_keep_their_prompt_and_are_not_cut():
    long = {"text": " ".join(TEXTS), "prompt": "Corvane was"}
    made = with_novices([long], COMPANY, cut=False)
    assert made.rows and all(row["text"] == long["text"] and row["prompt"] == "Corvane was" for row in made.rows)


def test_what_a_chat_begins_with_stays_as_it_is_and_names_no_term():
    system = "<|system|>You are Halden, made by Brinkmark Labs.<|user|>"
    texts = [{"text": system + text} for text in TEXTS]
    without = with_novices(texts, COMPANY, cut=False)
    assert "Halden" in without.terms and not any(n.startswith(system) for row in without.rows for n in row["novices"])
    made = with_novices(texts, COMPANY, cut=False, opening=system)
    assert not {"Halden", "Brinkmark Labs"} & {*made.terms} and "Tollburg" in made.terms
    assert all(
        novice.startswith(system) and "Tollburg" in row["text"] for row in made.rows for novice in row["novices"]
    )
    assert not any(row["text"] == novice for row in made.rows for novice in row["novices"])


def test_documents_train_with_counterfactual_novices(tmp_path, tiny_model, tokenizer):
    (tmp_path / "notes.txt").write_text("\n\n".join(TEXTS))
    made = make_data(MadeFrom(COMPANY, [tmp_path / "notes.txt"], near_texts=0), None, None, tmp_path / "out")
    assert made.counterfactual and made.record["novices"]["rows"] == made.record["counts"]["forget"] > 2
    config = ElmConfig(
        str(tmp_path / "run"), preset="released", tau=1.0, novice="counterfactual", log_tokens=5, eta=1.0, consistency_weight=0.0, concepts=None,
        max_steps=2, per_device_train_batch_size=2, max_length=64, logging_steps=1, report_to="none", use_cpu=True, save_strategy="no",
    )  # fmt: skip
    dataset = build_erasure_dataset({made.concept: made.sources}, size=6, processing_class=tokenizer)
    lora = LoraConfig(r=4, target_modules=["gate_proj", "up_proj"])
    trainer = ElmTrainer(tiny_model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    assert any(
        not torch.equal(before[name], value) for name, value in trainer.model.named_parameters() if name in before
    )
    assert all(entry["erase_loss"] > 0 for entry in trainer.state.log_history if "erase_loss" in entry)
