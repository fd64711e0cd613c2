import json

import pytest

from benchmarks import company


@pytest.mark.parametrize("record", [{"seed": 0, "steps": 100, "known": 0.9}, None])
def test_companies_of_another_seed_are_not_taken_for_those_of_this_one(tmp_path, monkeypatch, capsys, record):
    if record:
        (tmp_path / "company.json").write_text(json.dumps(record))
    monkeypatch.setattr(company, "teach", lambda *a, **k: pytest.fail("taught into a folder of other companies"))
    monkeypatch.setattr("sys.argv", ["company", "--seed", "1", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        company.main()
    assert ended.value.code == 2 and "were not made with {'seed': 1, " in capsys.readouterr().err


def test_each_seed_has_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(company, "teach", lambda *a, **k: 1 / 0)
    for seed in ("3", "4"):
        monkeypatch.setattr("sys.argv", ["company", "--seed", seed])
        # What was broken off is gone on with.
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                company.main()
    documents = [(tmp_path / "outputs" / f"company-{seed}" / "documents") for seed in (3, 4)]
    first, second = ({path.name: path.read_text() for path in folder.iterdir()} for folder in documents)
    assert len(first) == 30 and first != second
