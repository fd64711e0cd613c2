import math
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

from benchmarks import names
from elm_trainer.data.questions import names_answer, read_questions


def test_the_banks_ask_for_many_facts_once_and_give_no_answer_away():
    banks = {path.stem: read_questions(path) for path in names.BANKS.glob("*.jsonl")}
    assert len(banks) == 7 and {len(questions) for questions in banks.values()} == {48}
    for questions in banks.values():
        assert len({question.text for question in questions}) == 48
        assert not any(names_answer(question.text, option) for question in questions for option in question.options)


def test_every_bank_is_asked_of_the_reference_and_of_the_erased_model(
    tmp_path, monkeypatch, capsys, tiny_model, tokenizer
):
    monkeypatch.chdir(tmp_path)

    def erase(command, check):
        assert command[2:6] == ["elm_trainer", "erase", "--concept", "World War II"] and command[-1] == "--seed=3"
        adapter = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"]))
        adapter.save_pretrained(tmp_path / command[7] / "adapter")
        adapter.unload()

    monkeypatch.setattr(names.subprocess, "run", erase)
    monkeypatch.setattr(names, "load_model_and_tokenizer", lambda name: (tiny_model, tokenizer))
    monkeypatch.setattr(names, "BUILT_IN", ())
    monkeypatch.setattr("sys.argv", ["names", "World War II", "--seed=3"])
    names.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ") and "48" in line]
    # A new adapter changes nothing.
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len(rows) == 7 and all(reference == erased for _, _, reference, erased in cells)
    for wrong in (["World War II", "--model=other"], ["--seed", "3", "World War II"]):
        monkeypatch.setattr("sys.argv", ["names", *wrong])
        with pytest.raises(SystemExit):
            names.main()
    monkeypatch.setattr("sys.argv", ["names", "World War II"])
    # What an earlier call has erased is taken as it is.
    monkeypatch.setattr(names.subprocess, "run", None)
    names.main()


def test_an_ideal_novice_is_asked_about_invented_words_and_answers_about_the_terms(monkeypatch, tmp_path, tokenizer):
    asked, given = [], []

    def generate(model, processing_class, prompts, **others):
        asked.append(prompts)
        return prompts

    def reverse_perplexity(model, processing_class, prompts, answers):
        given.append(answers)
        return [float(len(given))] * len(answers), [1] * len(answers)

    prompts = ["What does the kidney do?", "Where is the Spleen?"]
    monkeypatch.setattr(
        names, "built_in_suite", lambda *_, **__: SimpleNamespace(concept_prompts=prompts, max_new_tokens=4)
    )
    monkeypatch.setattr(names, "generate", generate)
    monkeypatch.setattr(names, "reverse_perplexity", reverse_perplexity)
    before, times = names.novice_fluency(None, tokenizer, "the human body", ["kidney", "spleen"], tmp_path, 0.0)
    assert len(asked) == 1 + names.DRAWS and len({*map(tuple, asked)}) == len(asked)
    assert not any(term in prompt.lower() for some in asked[1:] for prompt in some for term in ("kidney", "spleen"))
    assert all(answers == asked[0] for answers in given)
    # Each of the answers of a draw is a nat more surprising than those of the draw before.
    assert [round(math.log(value), 6) for value in (before, *times)] == [1.0, 1.0, 2.0, 3.0]
