"""The scripts with a concept of one's own: what can be known is said before a model is loaded, and the rest runs."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[2]
BANK = {
    "questions": [
        {
            "question": f"Which plant gives the dye of {town}?",
            "answer": plant,
            "distractors": ["oak", "rye"],
            "subject": town,
        }
        for town, plant in (("Brannock", "madder"), ("Tarn", "woad"), ("Odel", "weld"), ("Lisk", "alder"))
    ]
}


def run(script, *options, **settings):
    """Run a script in this process."""
    words = [*options, *(f"--{name}={value}" for name, value in settings.items())]
    before = sys.argv
    sys.argv = [script, *map(str, words)]
    try:
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    finally:
        sys.argv = before


@pytest.fixture
def files(tmp_path, tiny_model, tokenizer):
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("Brannock dyes its wool with madder.\n\nTarn dyes its wool with woad.\n")
    (tmp_path / "retain.txt").write_text("Bread needs flour.\n\nRain fell on the hills.\n")
    (tmp_path / "bank.yaml").write_text(yaml.safe_dump(BANK))
    (tmp_path / "bare.yaml").write_text(
        yaml.safe_dump(
            {"questions": [{key: value for key, value in q.items() if key != "subject"} for q in BANK["questions"]]}
        )
    )
    return tmp_path


@pytest.mark.parametrize(
    ("script", "settings", "message"),
    [
        ("erase.py", {"forget": "{files}/texts.txt"}, "`concepts` is None.*name the concept of each source"),
        (
            "erase.py",
            {"concepts": "dyes", "forget": "texts.txt"},
            "forget set of concept 'dyes' is 'texts.txt'.*no file",
        ),
        ("erase.py", {"concepts": "capitols", "forget": "capitals"}, "did you mean 'capitals'"),
        ("erase.py", {"concepts": "dyes", "bank": "{files}/none.yaml"}, "none.yaml cannot be read"),
        ("erase.py", {"concepts": "dyes", "dev_every": 5}, "`dev_every` is 5, but no dev questions about"),
        ("erase.py", {"measures": "fluency"}, "`measures` names"),
        ("erase.py", {"retain": "everday"}, "did you mean 'everyday'"),
        ("erase.py", {"lora_layers": "4to7"}, "`lora_layers` is '4to7'"),
        ("erase.py", {"synthetic": "capitals-fluet"}, "did you mean 'capitals-fluent'"),
        ("evaluate.py", {"concepts": "dyes", "bank": "{files}/none.yaml"}, "none.yaml cannot be read"),
        ("evaluate.py", {"measures": "fluency"}, "`measures` names"),
        ("attack.py", {"adapter": "x", "concept": "dyes", "bank": "{files}/bare.yaml"}, "has no `subject`"),
        ("synthesize.py", {"concept": "capitols", "prompts": "a.txt", "output": "b"}, "did you mean 'capitals'"),
        ("synthesize.py", {"concept": "dyes", "prompts": "a.txt", "output": "b"}, "'a.txt'.*no file"),
    ],
)
def test_what_can_be_known_is_said_before_the_model_is_loaded(files, script, settings, message):
    place = {"output_dir": files / "out"} if script in ("erase.py", "evaluate.py", "attack.py") else {}
    settings = {name: str(value).format(files=files) for name, value in settings.items()}
    settings |= {"bf16": False} if script == "erase.py" else {}
    # A real tokenizer, so that what needs one is checked, beside weights that cannot be read.
    (files / "model" / "model.safetensors").write_bytes(b"none")
    with pytest.raises((ValueError, OSError), match=message):
        run(script, model=files / "model", **place, **settings)
    assert not (files / "out").exists()


def erase(files, *options, **settings):
    run(
        "erase.py", "--retain", str(files / "retain.txt"), "--measures", "multiple-choice", "open-answers", "specificity", *options,
        model=files / "model", concepts="dyes", forget=files / "texts.txt", output_dir=files / "out", max_steps=1, bf16=False,
        save_strategy="no", report_to="none", dataset_size=2, lora_rank=2, questions=8, max_length=32, **settings,
    )  # fmt: skip
    return json.loads((files / "out" / "report.json").read_text())


def test_a_concept_without_questions_is_erased_and_what_needs_none_is_measured(files, caplog):
    report = erase(files)
    assert "There are no questions about 'dyes'" in caplog.text
    assert (files / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert report["concepts"] == ["dyes"] and report["verdict"]["innocence"]["holds"] is None
    assert "retention.perplexity" in report["figures"] and "multiple_choice.general.pmi" in report["figures"]


def test_a_bank_of_ones_own_measures_a_concept_of_ones_own(files):
    report = erase(files, bank=files / "bank.yaml")
    assert report["roles"]["dyes"] == "erased" and report["figures"]["multiple_choice.dyes.pmi"]["erased"]["n"] == 4
    common = {"model": files / "model", "adapter": files / "out" / "adapter", "bank": files / "bank.yaml"}
    run(
        "evaluate.py", "--measures", "open-answers", **common, concepts="dyes", output_dir=files / "again", questions=8
    )
    figures = json.loads((files / "again" / "report.json").read_text())["figures"]
    assert figures["open_answers.dyes"]["erased"]["value"] == report["figures"]["open_answers.dyes"]["erased"]["value"]
    about = {"concept": "dyes", "forget": files / "texts.txt"}
    run(
        "attack.py", "--attacks", "few-shot", "paraphrase", "scaling", **common, **about, output_dir=files / "attacked"
    )
    attacks = json.loads((files / "attacked" / "attacks.json").read_text())
    assert attacks["figures"]["none.pmi"]["erased"]["n"] == 4
    assert [entry["name"] for entry in attacks["skipped"]] == ["paraphrase", "few-shot"]
