"""`elm erase --concept`: texts from what the user has, settings that fit, going on, and what ends it before anything is written."""

import json
import re
import shutil

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from elm_trainer import load_texts
from elm_trainer.cli import concept as concept_module
from elm_trainer.cli.concept import ConceptRun, default_folder
from elm_trainer.cli.erase_options import erasure_line
from elm_trainer.cli.main import main
from elm_trainer.fitting import OBJECTIVES
from elm_trainer.making import knowledge, make, questions
from elm_trainer.making.knowledge import StatedFacts
from elm_trainer.making.writing import SubjectTexts
from elm_trainer.methods import placement
from elm_trainer.modeling import layer_range

from ..like import byte_level
from ..making.test_facts import TABLE
from ..making.test_writing import writer


FIRST = "Varda makes blue glass in the town of Tolm, and sells it by the sea."
SECOND = "The kilns of Varda stand at the river, where Ada Brimm built them."
SMALL = (
    "--model=model --output_dir=out --evaluate=false --max_steps=2 --save_steps=1 --per_device_train_batch_size=2 --dataset_size=8 "
    "--max_length=48 --logging_steps=1 --disable_tqdm=true"
).split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small model, documents, facts and neighbors, in the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = byte_level()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text(FIRST)
    messages = [{"role": "user", "content": "Where are the kilns?"}, {"role": "assistant", "content": SECOND}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"prompt": "Who sells it?", "completion": " Varda sells it by the sea."})
    )
    (tmp_path / "facts.csv").write_text(TABLE)
    (tmp_path / "near.txt").write_text("The sea is deep and cold, says the fisher.\n")
    return tmp_path


def erase(*words):
    main(["erase", *SMALL, *words])


def fails(capsys, *words):
    """What is said of a wrong use."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        erase(*words)
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("elm")]
    return line


def read(path):
    return json.loads(path.read_text())


def test_facts_become_an_adapter_by_the_tested_objective(folder, capsys):
    erase("--concept", "capitals of lands", "--facts", "facts.csv", "--near", "near.txt")

    out, printed = folder / "out", capsys.readouterr().out
    run = read(out / "adapter" / "erasure_run.json")["recipe"]
    tested = {name: value for name, value in OBJECTIVES["readout"].items() if name != "lora_layers"}
    tested |= {"state_eta": 2.5, "retain_weight": 1.5}
    assert {name: run[name] for name in tested} == tested
    assert (run["max_steps"], run["per_device_train_batch_size"], run["gradient_accumulation_steps"]) == (2, 2, 5)
    assert read(out / "adapter" / "adapter_config.json")["r"] == 8  # a quarter of the hidden size
    chosen = yaml.safe_load((out / "chosen.yaml").read_text())
    assert chosen["lora_layers"] in ("0", "1", "0-1") and not chosen.keys() & {
        "max_steps",
        "dataset_size",
        "num_train_epochs",
    }
    assert all(re.search(rf"\b{name}\b", printed) for name in chosen) and "because" in printed
    assert "forget texts" in printed and "\n 10. " in printed  # the first ten of them
    assert {path.name for path in (out / "data").iterdir()} == {"forget.jsonl", "retain.jsonl", "data.json"}


ASKED = [
    "--concept=capitals of lands", "--facts=facts.csv", "--near=near.txt", "--evaluate=true", "--questions=4",
    "--measures", "multiple-choice", "--dev_every=1",
]  # fmt: skip


def test_its_own_questions_are_made_and_asked_during_and_after_training(folder, capsys, monkeypatch):
    # A random model knows no answer: all questions are taken for known.
    monkeypatch.setattr(questions, "_checked", lambda model, tokenizer, asked, *rest: (asked, {}))
    erase(*ASKED)

    out = folder / "out"
    rows = [json.loads(line) for line in (out / "data" / "questions" / "concept.jsonl").read_text().splitlines()]
    assert {row["split"] for row in rows} == {"dev", "test"}
    report = read(out / "report.json")
    assert any("capitals of lands" in name for name in report["figures"])
    assert report["recipe"]["bank"] == ["out/data/questions"]
    log = read(out / "checkpoint-2" / "trainer_state.json")["log_history"]
    assert any("dev_worst.pmi" in entry for entry in log)
    assert "questions about" in capsys.readouterr().out


def test_without_a_question_that_the_model_answers_it_is_erased_and_said(folder, caplog):
    erase(*ASKED)
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert "What is erased will not be measured" in caplog.text


def test_documents_of_several_kinds_become_one_forget_set_for_the_papers_contexts(folder):
    erase(
        "--concept=Varda: glass, kilns", "--near", "near.txt", "--synthetic_size=0", "--novice=contexts",
        "--documents", "notes", "chat.jsonl", "pairs.jsonl",
    )  # fmt: skip

    texts = load_texts(folder / "out" / "data" / "forget.jsonl")["text"][:]
    assert FIRST in texts and any(SECOND in text for text in texts)
    assert "Who sells it? Varda sells it by the sea." in texts
    assert read(folder / "out" / "adapter" / "erasure_run.json")["recipe"]["novice"] == "contexts"


def test_documents_with_names_are_led_where_they_are_read_out(folder, capsys):
    (folder / "notes" / "a.txt").write_text(FIRST + " " + SECOND + " In Tolm they call it the blue of Ada Brimm.")
    erase("--concept=Varda", "--documents=notes", "--near=near.txt")

    rows = load_texts(folder / "out" / "data" / "forget.jsonl")
    assert all(len(row["novices"]) == 2 for row in rows)
    assert {text[:8] for text in rows["text"]} > {"Question"} and FIRST in rows["text"][:]
    run = read(folder / "out" / "adapter" / "erasure_run.json")["recipe"]
    tested = {name: value for name, value in OBJECTIVES["readout"].items() if name != "lora_layers"}
    assert {name: run[name] for name in tested} == tested
    assert f"state_layers {run['state_layers']}: " in capsys.readouterr().out


def test_a_bare_name_is_written_about(folder, monkeypatch, capsys):
    monkeypatch.setattr("elm_trainer.making.writer.sample_texts", writer)
    monkeypatch.setattr(make, "write_facts", lambda *a, **k: StatedFacts())
    for module in (make, knowledge):
        monkeypatch.setattr(module, "check_known", lambda *a, **k: [])
    erase("--concept", "capitals of the world", "--synthetic_size=0")

    assert {"forget.jsonl", "near.jsonl", "retain.jsonl"} < {path.name for path in (folder / "out/data").iterdir()}
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert "Dropped of forget" in capsys.readouterr().out


def test_a_bare_name_without_facts_is_erased_by_its_terms(folder, monkeypatch, capsys):
    monkeypatch.setattr("elm_trainer.making.writer.sample_texts", writer)
    monkeypatch.setattr(make, "write_facts", lambda *a, **k: StatedFacts())
    texts = [f"The heart pumps blood to organ {n}, and the liver cleans it." for n in range(20)]
    found = SubjectTexts(["heart", "blood", "liver", "organ"], texts, {})
    monkeypatch.setattr(make, "write_by_terms", lambda *a, **k: found)
    for module in (make, knowledge):
        monkeypatch.setattr(module, "check_known", lambda *a, **k: [])
    erase("--concept", "the human body", "--synthetic_size=0")

    run = read(folder / "out" / "adapter" / "erasure_run.json")["recipe"]
    assert {name: run[name] for name in OBJECTIVES["terms"] if name in run}.items() <= OBJECTIVES["terms"].items()
    assert run["state_names"] is True and run["state_layers"] == [1]
    adapter = read(folder / "out" / "adapter" / "adapter_config.json")
    assert adapter["layers_to_transform"] == [0, 1] and "down_proj" in adapter["target_modules"]
    assert "a mere name without facts" in " ".join(capsys.readouterr().out.split())


def test_a_run_goes_on_where_it_stopped_and_begins_anew_where_that_is_wanted(folder, capsys):
    what = ["--concept=capitals of lands", "--facts=facts.csv", "--near=near.txt"]
    erase(*what)
    out = folder / "out"
    made = (out / "data" / "forget.jsonl").stat().st_mtime_ns
    assert "holds a finished run (adapter, data, checkpoint-2): `--resume` goes on" in fails(capsys, *what)
    shutil.rmtree(out / "adapter")
    assert "holds a run that was stopped (data, checkpoint-2)" in fails(capsys, *what)

    erase(*what, "--resume", "--max_steps=3")
    state = read(out / "checkpoint-3" / "trainer_state.json")
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]
    assert (out / "data" / "forget.jsonl").stat().st_mtime_ns == made and (out / "adapter").exists()

    shutil.rmtree(out / "checkpoint-3")
    erase(*what, "--resume")  # without a checkpoint, from the start
    assert (out / "checkpoint-2").exists() and (out / "data" / "forget.jsonl").stat().st_mtime_ns == made

    (out / "old").touch()
    erase(*what, "--overwrite")
    assert not (out / "old").exists() and (out / "data" / "forget.jsonl").stat().st_mtime_ns > made


def test_what_was_chosen_is_kept_by_a_run_that_goes_on(folder, monkeypatch):
    (folder / "out").mkdir()
    (folder / "out" / "chosen.yaml").write_text("lora_rank: 3\ndtype: float32\n")
    words = [*SMALL, "--concept=Varda", "--documents=notes"]

    def fitted(*more):
        run = ConceptRun(erasure_line("erase", [*words, *more]))
        run.fit_model(AutoConfig.from_pretrained("model"))
        return run

    assert fitted().arguments.lora_rank == 8
    assert fitted("--resume").arguments.lora_rank == 3
    assert fitted("--resume").chosen["lora_rank"].reason == "as the run had it that goes on"
    assert fitted("--resume", "--lora_rank=5").arguments.lora_rank == 5
    given = fitted("--fp16=true", "--gradient_checkpointing=true", "--dtype=auto", "--lora_layers=0-1")
    assert given.config.fp16 and not given.config.bf16 and given.config.activation_checkpointing
    assert given.arguments.dtype == "auto" and given.arguments.lora_layers == "0-1"


def test_a_run_by_terms_goes_on_as_one(folder):
    (folder / "out").mkdir()
    (folder / "out" / "chosen.yaml").write_text("state_weight: 1.0\nstate_names: true\nstate_layers: [1]\n")
    words = ["--output_dir=out", "--model=model", "--concept=the human body"]
    forget = Dataset.from_list([{"text": "The heart pumps blood."}])
    kind = {"counterfactual": True, "alike": False, "by_terms": True}

    def chosen(*more):
        run = ConceptRun(erasure_line("erase", [*words, *more]))
        run.fit_model(AutoConfig.from_pretrained("model"))
        run.fit_texts(forget, AutoTokenizer.from_pretrained("model"), kind)
        return run

    # The objective was given then, and stands in its settings alone.
    assert chosen("--resume").chosen["objective"].value == "terms"
    for given in (["--objective=terms", "--retain_loss=states"], ["--state_names=true"]):
        run = chosen(*given)
        assert run.config.state_names and run.config.state_weight == 1 and run.config.state_layers == [1]


def test_at_the_readout_layers_are_found_and_a_run_that_goes_on_keeps_them(folder, monkeypatch, capsys):
    what = ["--concept=capitals of lands", "--facts=facts.csv", "--near=near.txt"]
    erase(*what)
    out = folder / "out"
    chosen, run = (
        yaml.safe_load((out / "chosen.yaml").read_text()),
        read(out / "adapter" / "erasure_run.json")["recipe"],
    )
    by_texts = ("lora_layers", "state_eta", "retain_weight")
    tested = {n: v for n, v in OBJECTIVES["readout"].items() if n not in by_texts}
    assert {name: run[name] for name in tested} == tested
    assert chosen["lora_layers"] in ("0", "1", "0-1") and chosen["state_layers"] == [int(chosen["lora_layers"][-1])]
    assert run["state_layers"] == chosen["state_layers"]
    adapter = read(out / "adapter" / "adapter_config.json")
    assert adapter["layers_to_transform"] == layer_range(chosen["lora_layers"])
    assert set(adapter["target_modules"]) == {"k_proj", "o_proj", "q_proj", "v_proj"}
    assert f"lora_layers {chosen['lora_layers']}, state_layers {chosen['state_layers']}: " in capsys.readouterr().out
    monkeypatch.setattr(placement, "find_readout", None)  # nobody asks again

    erase(*what, "--resume", "--max_steps=3")
    run = read(out / "adapter" / "erasure_run.json")["recipe"]
    assert run["state_layers"] == chosen["state_layers"] and run["state_weight"] == 1
    assert yaml.safe_load((out / "chosen.yaml").read_text()) == chosen | {"objective": "readout"}

    # A run of an earlier version, which had no layers to find.
    shutil.rmtree(folder / "out" / "adapter")
    for path in (folder / "out").glob("checkpoint-*"):
        shutil.rmtree(path)
    (folder / "out" / "chosen.yaml").write_text("lora_layers: 0-1\nlog_tokens: 4\n")
    erase(*what, "--resume")
    run = read(folder / "out" / "adapter" / "erasure_run.json")["recipe"]
    assert (run["log_tokens"], run["state_weight"], run["erase_weight"]) == (4, 0, 1)


def test_layers_are_found_for_texts_of_ones_own_too(folder, monkeypatch, capsys):
    words = [
        "--concepts=capitals", "--forget=capitals", "--retain=near.txt", "--novice=counterfactual", "--erase_weight=0",
        "--state_weight=1", "--retain_loss=states", "--consistency_weight=0", "--lora_layers=auto", "--dataset_size=6",
        "--max_length=200",
    ]  # fmt: skip
    erase(*words)
    adapter = read(folder / "out" / "adapter" / "adapter_config.json")
    chosen = yaml.safe_load((folder / "out" / "chosen.yaml").read_text())
    assert adapter["layers_to_transform"] == layer_range(chosen["lora_layers"])
    assert read(folder / "out" / "adapter" / "erasure_run.json")["recipe"]["state_layers"] == chosen["state_layers"]
    assert f"lora_layers {chosen['lora_layers']}, state_layers" in capsys.readouterr().out

    monkeypatch.setattr(placement, "find_readout", None)
    erase(*words, "--resume", "--max_steps=3")
    assert "as the run had it that goes on" in capsys.readouterr().out
    assert "found by what counterfactual novices lack" in fails(capsys, "--lora_layers=auto", "--retain=near.txt")
    assert "`objective` is 'readout', but settings are chosen for a `concept`" in fails(capsys, "--objective=readout")


def test_of_an_unknown_name_nothing_is_written_and_nothing_removed(folder, capsys):
    assert "error: `concept` is 'Dravenholt', of which this model knows nothing" in fails(
        capsys, "--concept", "Dravenholt"
    )
    assert not (folder / "out").exists()
    (folder / "out" / "adapter").mkdir(parents=True)
    assert "knows nothing" in fails(capsys, "--concept", "Dravenholt", "--overwrite")
    assert [path.name for path in (folder / "out").iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--concept Tolm --facts none.csv", "`facts` is 'none.csv'"),
        ("--concept Tolm --documents nowhere", "`documents` is 'nowhere'"),
        ("--concept Tolm --documents notes --near everday", "did you mean 'everyday'"),
        ("--concept Tolm --documents notes --retain none.txt", "'none.txt'"),
        ("--concept Tolm --documents notes --lora_layers 4to7", "`lora_layers` is '4to7'"),
        ("--concept Tolm --facts facts.csv --objective log-space --tau 1.2", "`tau` is 1.2 with `log_tokens=8`"),
        ("--concept Tolm --facts facts.csv --dev_every 2", r"no dev questions about \['Tolm'\]"),
    ],
)
def test_what_is_wrong_with_sources_and_settings_is_said_before_the_model_is_loaded(
    words, message, folder, monkeypatch, capsys
):
    (folder / "model" / "model.safetensors").write_bytes(b"none")
    assert re.search(message, fails(capsys, *words.split()))
    assert not (folder / "out").exists()


def test_the_doctor_plans_what_would_be_made_and_writes_nothing(folder, capsys):
    with pytest.raises(SystemExit):  # the facts are there, the model is not
        main(["doctor", *SMALL, "--concept=x", "--facts=facts.csv", "--model=./nothing"])
    assert "settings" in capsys.readouterr().out
    before = set(folder.rglob("*"))
    main(["doctor", *SMALL, "--concept=capitals of lands", "--facts=facts.csv", "--near=near.txt"])
    page = " ".join(capsys.readouterr().out.split())
    assert "8 rows of forget 768, retain" in page and "near.txt 1" in page and "objective readout," in page
    assert "state_eta 2.5" in page
    assert "Nothing is in the way" in page and set(folder.rglob("*")) == before
    main(["doctor", *SMALL, "--concept=capitals of the world"])
    page = " ".join(capsys.readouterr().out.split())
    assert "the model is to write 384 about it and its terms, 96 about neighbors" in page
    assert "480 questions about what facts name, 192 about what they state, of which two thirds" in page
    told = "if it states facts, the objective is readout, not as here"
    assert "state_names True" in page and told in page and "lora_layers 0-1" in page
    main(["doctor", *SMALL, "--concept=capitals of the world", "--log_strength=2"])
    page = " ".join(capsys.readouterr().out.split())
    assert "log_tokens 8" in page and told not in page
    main(["doctor", *SMALL, "--concept=capitals of the world", "--objective=contexts"])
    assert told not in " ".join(capsys.readouterr().out.split())
    # What the readout does not read chooses the objective, and a state term is not put beside it.
    facts = ["doctor", *SMALL, "--concept=capitals of lands", "--facts=facts.csv", "--near=near.txt"]
    main([*facts, "--retain_loss=log", "--log_strength=2"])
    assert "objective log-space" in " ".join(capsys.readouterr().out.split())
    for last in (["--retain_loss=states"], ["--erase_after=0.9", "--erase_weight=0.04", "--log_tokens=8"]):
        main([*facts, *last, "--eta=1.2"])
        assert "objective readout" in " ".join(capsys.readouterr().out.split())
    assert set(folder.rglob("*")) == before


def test_a_folder_has_the_concepts_name():
    assert default_folder("Capitals of the World: Oslo, Rome") == "outputs/capitals-of-the-world"
    assert default_folder("???") == "outputs/concept"
    assert concept_module.CHOSEN_FILE.endswith(".yaml")
