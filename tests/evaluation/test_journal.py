import json

from elm_trainer.evaluation.journal import Journal


def test_finished_work_is_not_done_again(tmp_path):
    path, calls = tmp_path / "rows.jsonl", []
    for _ in range(2):
        journal = Journal(path, {"model": "a"})
        row = journal.once("count", {"n": (1, 2)}, lambda: calls.append(1) or {"value": (3, 4)})
        assert row["result"] == {"value": [3, 4]}
    assert calls == [1]


def test_other_settings_and_other_models_are_measured_anew(tmp_path):
    path, calls = tmp_path / "rows.jsonl", []
    for identity, settings in (("a", {"n": 1}), ("a", {"n": 2}), ("b", {"n": 1}), ("a", {"n": 1})):
        Journal(path, {"model": identity}).once("count", settings, lambda: calls.append(1))
    assert len(calls) == 3


def test_the_half_line_of_a_killed_run_is_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    Journal(path, {}).once("first", {}, lambda: 1)
    with path.open("a") as file:
        file.write('{"name": "second", "sett')
    Journal(path, {}).once("third", {}, lambda: 3)
    assert [Journal(path, {}).once(name, {}, lambda: 0)["result"] for name in ("first", "second", "third")] == [
        1,
        0,
        3,
    ]


def test_work_that_fails_leaves_no_row_and_closing_removes_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    journal = Journal(path, {})
    journal.once("good", {}, lambda: 1)
    try:
        journal.once("bad", {}, lambda: 1 / 0)
    except ZeroDivisionError:
        pass
    assert [json.loads(line)["name"] for line in path.read_text().split("\n") if line] == ["good"]
    journal.close()
    assert not path.exists()


def test_without_a_path_nothing_is_kept():
    journal = Journal(None, {})
    assert journal.once("a", {}, lambda: 1)["result"] == 1
    journal.close()
