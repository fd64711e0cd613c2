import json
import re

import pytest

from elm_trainer import ConceptSources, build_erasure_dataset, load_texts
from elm_trainer.data.facts import STAND_INS, Fact
from elm_trainer.making.facts import fact_phrasings, facts_texts, held_out_of, likeness, mostly_alike, read_facts
from elm_trainer.making.make import MadeFrom, make_data


TABLE = """subject,relation,answer
Norway,capital,Oslo
Kenya,capital,Nairobi
Peru,the capital,Lima
France,capital,Paris
Japan,capital,Tokyo
France,continent,Europe
Norway,continent,Europe
Kenya,continent,Africa
Varda,founder,Ada Brimm
"""


@pytest.fixture
def facts(tmp_path):
    (tmp_path / "facts.csv").write_text(TABLE)
    return read_facts(tmp_path / "facts.csv")


def test_a_table_is_read_with_relations_as_groups(facts):
    assert len(facts) == 9
    assert (facts[2].subject, facts[2].near["relation"], facts[2].answer, facts[2].group) == (
        "Peru", "capital", "Lima", "capital"
    )  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "tsv"])
def test_other_tables_are_read_too(tmp_path, ending):
    from datasets import Dataset

    path = tmp_path / f"facts.{ending}"
    rows = Dataset.from_list([{"subject": "Oxygen", "relation": "atomic number", "answer": 8, "group": "gas"}])
    if ending == "tsv":
        rows.to_csv(str(path), sep="\t")
    else:
        getattr(rows, {"jsonl": "to_json"}.get(ending, "to_parquet"))(str(path))
    [fact] = read_facts(path)
    assert (fact.answer, fact.group) == ("8", "gas")


def test_every_fact_is_stated_in_every_phrasing(facts):
    rows = facts_texts(facts)
    assert len(rows) == len(facts) * len(fact_phrasings()) == len(facts) * 96
    assert "The capital of Norway is Oslo." in rows["text"][:]
    assert all("{" not in text for text in rows["text"])
    norway = [text for text in rows["text"] if "Oslo" in text]
    assert len(set(norway)) == 96 and all("Norway" in text and "capital" in text for text in norway)


def test_the_first_rows_tell_of_all_facts_alike(facts):
    texts = facts_texts(facts)["text"][: 3 * len(facts)]
    for fact in facts:
        told = [
            text for text in texts if fact.subject in text and fact.answer in text and fact.near["relation"] in text
        ]
        assert len(told) == len({*told}) == 3


def test_novices_are_of_the_same_relation_and_never_true(facts):
    true = {f"The {fact.near['relation']} of {fact.subject} is {fact.answer}." for fact in facts}
    for row in facts_texts(facts):
        assert row["novice"] != row["text"]
        assert len(row["novices"]) == STAND_INS and not true & {*row["novices"]} and row["text"] not in row["novices"]
        if row["text"] == "The capital of Norway is Oslo.":
            told = [novice.removeprefix("The capital of ").removesuffix(" is Oslo.") for novice in row["novices"]]
            assert {*told} < {"Kenya", "Peru", "France", "Japan"}
        # The only other fact about a continent that is not Europe is Kenya's; a second one is invented.
        if row["text"] == "The continent of Norway is Europe.":
            assert "The continent of Kenya is Europe." in row["novices"]
        # Varda is the only one with a founder.
        if row["text"] == "Ada Brimm is the founder of Varda.":
            assert all(novice.endswith(" is the founder of Varda.") for novice in row["novices"])


def capital(subject, answer, group="capital", relation="capital"):
    return Fact(subject, answer, group, {"relation": relation})


def test_a_model_takes_those_for_stand_ins_whose_names_it_reads_alike(tiny_model, tokenizer):
    lands = [capital(f"{kind} {n}", f"Town{kind}{n}") for kind in ("Zoo", "Moor") for n in range(6)]
    found = likeness(lands, tiny_model, tokenizer)
    alike, names = found["capital"], {land.subject for land in lands}
    assert found.keys() == {"capital"} and alike.keys() == names
    assert all(abs(alike[name][name] - 1) < 1e-5 and alike[name].keys() == names for name in names)
    assert alike["Zoo 0"]["Moor 1"] == pytest.approx(alike["Moor 1"]["Zoo 0"], abs=1e-5)
    assert -1 <= alike["Zoo 0"]["Moor 1"] < 1
    seen = set()
    for row in facts_texts(lands, processing_class=tokenizer, alike=found):
        if match := re.fullmatch(r"The capital of (\w+ \d) is Town\w+\d\.", row["text"]):
            own = match[1]
            nearest = sorted(names - {own}, key=alike[own].get, reverse=True)[:4]
            named = {re.fullmatch(r"The capital of (\w+ \d) is .*", novice)[1] for novice in row["novices"]}
            assert named <= {*nearest} and len(named) == STAND_INS
            seen.add(own)
    assert seen == names


def test_relations_with_groups_or_few_facts_have_stand_ins_of_their_own(tiny_model, tokenizer):
    grouped = [capital(f"Zoo {n}", f"Town {n}", group=str(n % 2)) for n in range(6)]
    few = [capital(f"Zoo {n}", f"Sea {n}", relation="sea") for n in range(STAND_INS)]
    rivers = [capital(f"Zoo {n}", f"River {n}", relation="river") for n in range(STAND_INS + 1)]
    assert likeness([*grouped, *few, *rivers], tiny_model, tokenizer).keys() == {"river"}
    assert mostly_alike([*rivers, *few], ["river"]) and not mostly_alike([*rivers, *grouped], ["river"])
    assert not mostly_alike([], [])


def test_a_group_that_relations_share_keeps_them_apart(tiny_model, tokenizer):
    # In both relations the same subject has the same answer.
    facts = [
        capital("Kenya", "Nairobi", "Africa"),
        capital("Nigeria", "Abuja", "Africa"),
        capital("Mali", "Bamako", "Africa"),
    ]
    cities = [("Kenya", "Nairobi"), ("Nigeria", "Lagos"), ("Egypt", "Cairo")]
    facts += [capital(*pair, "Africa", "largest city") for pair in cities]
    alike = likeness(facts, tiny_model, tokenizer)
    assert {relation: set(names) for relation, names in alike.items()} == {
        "capital": {"Kenya", "Nigeria", "Mali"}, "largest city": {"Kenya", "Nigeria", "Egypt"}
    }  # fmt: skip
    rows = facts_texts(facts, alike=alike)
    assert len(rows) == 6 * len(fact_phrasings()) and all(len(row["novices"]) == STAND_INS for row in rows)


class Bare:
    """A decoder whose last norm is not a part of its own."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.last_hidden_state = found.last_hidden_state + 1
        return found


def test_where_a_models_states_cannot_be_read_stand_ins_are_drawn(
    folder_of_facts, tiny_model, tokenizer, monkeypatch, caplog
):
    kind = type("Bare", (Bare, type(tiny_model.model)), {})
    monkeypatch.setattr(tiny_model.model, "__class__", kind)
    made = make_data(MadeFrom("capitals", facts="facts.csv", near_texts=0), tiny_model, tokenizer, "out")
    assert (
        "stand in for each other at random" in caplog.text and "The final norm of Bare cannot be found" in caplog.text
    )
    assert made.counterfactual and made.record["alike"] is False


@pytest.mark.parametrize(
    ("extra", "documents", "alike"), [("", (), True), ("\nOslo,capital,None,north", (), False), ("", ["a.txt"], False)]
)
def test_it_is_told_whether_stand_ins_are_read_alike(folder_of_facts, tiny_model, tokenizer, extra, documents, alike):
    (folder_of_facts / "a.txt").write_text("Varda makes blue glass in the town of Tolm, and sells it by the sea.")
    table = (folder_of_facts / "facts.csv").read_text().splitlines()
    (folder_of_facts / "facts.csv").write_text(
        "\n".join([f"{table[0]},group", *(f"{row},x" for row in table[1:])]) + extra + "\n"
    )
    made = make_data(MadeFrom("Varda", documents, "facts.csv", near_texts=0), tiny_model, tokenizer, "out")
    assert made.record["alike"] is alike and made.counterfactual


@pytest.fixture
def folder_of_facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facts.csv").write_text(TABLE)
    return tmp_path


def test_facts_are_read_back_as_a_source_with_novices(facts, tmp_path, tokenizer):
    path = tmp_path / "forget.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in facts_texts(facts, processing_class=tokenizer)))
    assert load_texts(path).to_list() == facts_texts(facts, processing_class=tokenizer).to_list()
    dataset = build_erasure_dataset({"capitals": ConceptSources(str(path), "everyday")}, size=20)
    assert all(len(novices) == STAND_INS for novices in dataset["novices"])


def test_the_seed_decides_and_held_out_subjects_stand_in_no_text(facts):
    assert facts_texts(facts, seed=1).to_list() == facts_texts(facts, seed=1).to_list() != facts_texts(facts).to_list()
    held_out = held_out_of(facts)
    assert len(held_out) == 1 and held_out == held_out_of(facts) and not held_out_of(facts[:4])
    rows = facts_texts(facts, held_out=held_out)
    stated = [*rows["text"], *(novice for novices in rows["novices"] for novice in novices)]
    assert not any(subject in text for subject in held_out for text in stated)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("subject,answer\nNorway,Oslo\n", r"lacks the columns \['relation'\]; it has \['subject', 'answer'\]: write a header"),
        ("subject,relation,answer\n", "holds no rows: write at least one fact"),
        ("subject,relation,answer\nNorway,capital,Oslo\nPeru,capital,\n", "row 2: `answer` is '': give a text"),
        ("subject,relation,answer\nNorway,was founded by,Harald\n", "row 1: `relation` is 'was founded by', no noun phrase"),
        ("subject,relation,answer\nNorway,capital of,Oslo\n", "row 1: `relation` is 'capital of', no noun phrase"),
        ("subject,relation,answer\nNorway,name,norway\n", "row 1: `answer` is 'norway', the subject itself"),
        ("subject,relation,answer\nNorway,capital,Oslo,1\n", "facts.csv', which is no readable .csv file .*quotes"),
    ],
)  # fmt: skip
def test_wrong_tables_are_answered_in_a_line(tmp_path, table, message):
    (tmp_path / "facts.csv").write_text(table)
    with pytest.raises(ValueError, match=f"^`facts`.*{message}") as caught:
        read_facts(tmp_path / "facts.csv")
    assert "\n" not in str(caught.value)


def test_facts_that_are_there_twice_are_taken_once(tmp_path):
    (tmp_path / "facts.csv").write_text("subject,relation,answer\nNorway,capital,Oslo\nNorway,the capital,Oslo\n")
    assert len(read_facts(tmp_path / "facts.csv")) == 1


@pytest.mark.parametrize(("share", "message"), [(1.0, "`share` is 1.0"), (-0.1, "`share` is -0.1")])
def test_a_wrong_share_is_refused(facts, share, message):
    with pytest.raises(ValueError, match=message):
        held_out_of(facts, share)


def test_a_table_that_is_not_there_is_named():
    with pytest.raises(OSError, match="`facts` is 'fcats.csv': no built-in source, no file"):
        read_facts("fcats.csv")


def test_nothing_left_to_state_is_refused(facts):
    with pytest.raises(ValueError, match="None of the 9 facts is left to state: hold out fewer subjects than 6"):
        facts_texts(facts, held_out=frozenset(fact.subject for fact in facts))
