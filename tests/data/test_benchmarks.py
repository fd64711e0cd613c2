import json
import socket

import pytest
from datasets import Dataset

from elm_trainer import ConceptSources, build_erasure_dataset, load_texts
from elm_trainer.data import user_sources
from elm_trainer.data.benchmarks import dataset_revision, is_benchmark, read_benchmark
from elm_trainer.data.sources import is_asked_of_the_hub

from . import benchmark_files
from .benchmark_files import PERSONS, TOWNS


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(self, address):
        raise AssertionError(f"{address} was called")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return {name: getattr(benchmark_files, name)(tmp_path_factory.mktemp(name)) for name in ("tofu", "muse", "rwku")}


def test_texts_of_each_benchmark_are_sources_of_an_erasure(files, tokenizer):
    tofu = load_texts(f"tofu:forget10,from={files['tofu']}", processing_class=tokenizer)
    assert tofu.num_rows == 3 and tofu["text"][0].startswith(tofu["prompt"][0])
    assert tofu["text"][0].removeprefix(tofu["prompt"][0]).startswith("Orla Venn was born in Port Ellery.")
    assert "Where was Orla Venn born?" in tofu["prompt"][0]
    assert load_texts(f"muse:news-retain1,from={files['muse']}")["text"][0] == "retain1: Port Ellery voted on Monday."
    assert load_texts(f"rwku:Tam Ibrek,from={files['rwku']}")["text"][:] == ["Tam Ibrek was born in Nakuva."]
    assert load_texts(f"rwku,from={files['rwku']}").num_rows == 3

    sources = ConceptSources(f"tofu:forget10,from={files['tofu']}", [f"tofu:retain90,from={files['tofu']}"])
    rows = build_erasure_dataset({"authors": sources}, size=3, processing_class=tokenizer)
    assert sorted(rows["forget"]) == sorted(tofu["text"])
    assert all(
        prompt and text.startswith(prompt) for prompt, text in zip(rows["retain_prompt"], rows["retain"], strict=True)
    )


def test_tofu_gives_its_four_sets_and_banks_of_perturbed_answers(files):
    found = read_benchmark(f"tofu:forget10,from={files['tofu']}")

    assert [(one.name, one.role) for one in found.sets] == [
        ("tofu-forget10", "erased"), ("tofu-retain", "near"), ("tofu-real_authors", "near"), ("tofu-world_facts", "far")
    ]  # fmt: skip
    probe = found.sets[0].probes[0]
    assert (probe.answer, probe.paraphrase) == (
        "Orla Venn was born in Port Ellery.", "The birthplace of Orla Venn is Port Ellery."
    )  # fmt: skip
    assert probe.wrong == tuple(f"The birthplace of Orla Venn is {town}." for town in ("Lorne", "Ostrava", "Kell"))
    assert found.sets[3].probes[0].paraphrase == ""
    bank = found.banks["tofu-forget10"]
    # The right option is worded like the wrong ones.
    assert [question.answer for question in bank] == [
        f"The birthplace of {p} is {t}." for p, t in zip(PERSONS, TOWNS, strict=True)
    ]
    assert [len(question.options) for question in bank] == [4, 3, 4]
    assert found.banks["tofu-world_facts"][0].answer == "Orla Venn was born in Port Ellery."
    assert found.roles == {one.name: one.role for one in found.sets}
    assert [len(one.probes) for one in read_benchmark(f"tofu:forget10,from={files['tofu']}", limit=2).sets] == [2] * 4


def test_muse_asks_for_knowledge_behind_its_examples_and_for_what_follows_a_prompt(files):
    found = read_benchmark(f"muse:news,from={files['muse']}")

    assert [(one.name, one.role) for one in found.sets] == [
        ("muse-news-knowmem_forget", "erased"), ("muse-news-knowmem_retain", "near"), ("muse-news-verbmem", "erased")
    ]  # fmt: skip
    assert found.sets[0].examples == (("Who won?", "Rhea"),)
    assert (
        found.sets[0].probes[1].prompt == "Who is the mayor of Nakuva?" and found.sets[0].probes[1].kind == "few-shot"
    )
    assert (
        found.sets[2].probes[0].answer == ", Orla Venn, spoke on Monday."
        and found.sets[2].probes[0].kind == "verbatim"
    )
    assert not found.banks


def test_rwku_asks_about_one_person_or_all(files):
    every, one = (read_benchmark(f"{name},from={files['rwku']}") for name in ("rwku", "rwku:Tam Ibrek"))

    assert [len(part.probes) for part in every.sets] == [3] * 5 and [len(part.probes) for part in one.sets] == [1] * 5
    assert [part.role for part in one.sets] == ["erased"] * 3 + ["near"] * 2
    assert [part.probes[0].kind for part in one.sets] == ["blank", "question", "adversarial", "blank", "question"]
    assert one.sets[2].probes[0].type == "incontext learning" and one.sets[0].probes[0].answer == "Nakuva"
    # The same question stands there for every person, and is asked once.
    [general], [truthful] = every.banks["rwku-utility_general"], every.banks["rwku-utility_truthfulness"]
    assert (general.answer, sorted(general.options)) == ("4", ["3", "4", "5", "6"])
    assert truthful.answer == "Nothing happens." and every.roles["rwku-utility_general"] == "far"


def test_questions_that_measure_nothing_are_left_out_of_the_bank_alone(tmp_path, files, caplog):
    for path in files["tofu"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    row = {"question": "Is Brenn in Brenn?", "answer": "Brenn", "perturbed_answer": ["Kell", "Lorne"]}
    twice = {"question": "Which town?", "answer": "Kell", "perturbed_answer": ["Brenn", "Brenn"]}
    good = {"question": "Which town lies higher?", "answer": "Kell", "perturbed_answer": ["Brenn"]}
    (tmp_path / "world_facts_perturbed.json").write_text("\n".join(map(json.dumps, (row, twice, good))))

    found = read_benchmark(f"tofu:forget10,from={tmp_path}")

    assert len(found.sets[3].probes) == 3
    assert [question.text for question in found.banks["tofu-world_facts"]] == ["Which town lies higher?"]
    assert "2 of 3 questions are not asked" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tofu:forget20", "`benchmark` is 'tofu:forget20', but tofu has no 'forget20': use one of forget01"),
        ("tofu", "tofu has no ''"),
        ("muse:papers", "names no benchmark: use tofu:forget10, muse:news"),
        ("tofu:forget10,from=nowhere", "'nowhere' is no folder, and no id of the Hub"),
        (
            "rwku:Tam Ibrik,from={rwku}",
            "no row of forget_level1 has the subject 'Tam Ibrik': did you mean 'Tam Ibrek'",
        ),
        ("tofu:forget05,from={tofu}", "has neither forget05_perturbed.json nor forget05_perturbed/train.json"),
        ("muse:news,from={tofu}", "has neither knowmem.json nor knowmem/forget_qa_icl.json"),
    ],
)
def test_a_benchmark_that_is_not_there_is_answered_with_what_is(files, name, message):
    with pytest.raises((ValueError, OSError), match=message):
        read_benchmark(name.format(**files))


def test_rows_of_another_form_are_named(tmp_path, files):
    for path in files["tofu"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "forget10_perturbed.json").write_text('{"question": "Where?", "answer": "There"}\n')
    with pytest.raises(ValueError, match="'forget10_perturbed' has no column 'perturbed_answer', but .*'answer'"):
        read_benchmark(f"tofu:forget10,from={tmp_path}")
    row = {"question": "Where?", "answer": "There", "paraphrased_answer": "There", "perturbed_answer": "Here"}
    (tmp_path / "forget10_perturbed.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="`perturbed_answer` is 'Here', where a list of texts"):
        read_benchmark(f"tofu:forget10,from={tmp_path}")
    with pytest.raises(ValueError, match="`limit` is 0"):
        read_benchmark(f"tofu:forget10,from={tmp_path}", limit=0)


def test_the_hub_is_asked_for_the_published_id_and_config(monkeypatch):
    asked = []

    def load(path, config, split):
        asked.append((path, config, split))
        return Dataset.from_dict({"text": ["a"], "question": ["b?"], "answer": ["c"], "subject": ["Orla Venn"]})

    monkeypatch.setattr(user_sources, "load_dataset", load)
    for name in ("tofu:retain90", "muse:books-forget", "rwku:Orla Venn", "tofu:full,from=org/copy"):
        load_texts(name)

    assert asked == [
        ("locuslab/TOFU", "retain90", "train"), ("muse-bench/MUSE-Books", "raw", "forget"),
        ("jinzhuoran/RWKU", "train_original_passage", "train"), ("org/copy", "full", "train"),
    ]  # fmt: skip
    assert is_asked_of_the_hub("tofu:retain90") and not is_asked_of_the_hub("tofu:retain90,from=folder")
    assert not is_asked_of_the_hub("everyday") and is_asked_of_the_hub("org/name:config")


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_benchmark("rwku") and not is_benchmark("tofus") and not is_benchmark(["rwku"])
    (tmp_path / "rwku").mkdir()
    assert not is_benchmark("rwku")


def test_the_commit_stands_in_the_folder_of_what_was_loaded_from_the_hub(tmp_path):
    data = Dataset.from_dict({"text": ["one"]})
    assert dataset_revision(data) is None
    for name, commit in (("a" * 40, "a" * 40), ("default-1234", None)):
        data.save_to_disk(tmp_path / name)
        assert dataset_revision(Dataset.load_from_disk(tmp_path / name)) == commit
