import io
from functools import partial
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from rich.console import Console

from benchmarks import names, novice
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


def test_an_ideal_novice_is_asked_about_invented_words_and_answers_about_the_terms(monkeypatch, tokenizer):
    asked, given = [], []

    def generate(model, processing_class, prompts, **others):
        asked.append(prompts)
        return SimpleNamespace(texts=prompts)

    def reverse_perplexity(model, processing_class, prompts, answers):
        given.append(answers)
        return [float(len(given))] * len(answers), [1] * len(answers)

    monkeypatch.setattr(novice, "generate_answers", generate)
    monkeypatch.setattr(novice, "reverse_perplexity", reverse_perplexity)
    prompts = ["What does the kidney do?", "Where is the Spleen?"]
    swap = partial(names.terms_swapped, "the human body", ["kidney", "spleen"], ["The kidney filters blood."])
    told = io.StringIO()
    novice.print_fluency(None, tokenizer, prompts, 4, swap, Console(file=told, width=200))
    assert len(asked) == 2 * (1 + novice.DRAWS) and len({*map(tuple, asked)}) == 1 + novice.DRAWS
    swapped = [prompt.lower() for some in (*asked[1:4], *asked[5:]) for prompt in some]
    assert not any(term in prompt for prompt in swapped for term in ("kidney", "spleen"))
    assert all(answers == asked[0] for answers in given)
    # The answers of each draw are a nat more surprising than those before.
    line = told.getvalue().splitlines()[0]
    assert line == "R-PPL, greedy: 2.72; ideal novice 2.72, 7.39, 20.09 times that"
