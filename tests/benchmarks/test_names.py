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
