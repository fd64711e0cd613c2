import errno
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_trainer.files import Journal, sealed
from tests.fuzz import fuzz


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


ROW = {
    "name": "first",
    "settings": {"n": 1},
    "result": {"values": [1.5, 2]},
    "seconds": 0.1,
    "identity": {"model": "a"},
}
GOOD = json.dumps(sealed(ROW)).encode()
DAMAGED = {
    "half a line": GOOD[:40],
    "no text": b"\xff\xfe" + GOOD,
    "a list": b"[1, 2]",
    "a text": b'"x"',
    "a number": b"3",
    "null": b"null",
    "no result": json.dumps({key: ROW[key] for key in ("name", "settings", "identity")}).encode(),
    "an identity alone": json.dumps({"identity": ROW["identity"]}).encode(),
    "zeros after a power cut": bytes(4096),
    "deep": b"[" * 100_000,
    "no checksum": json.dumps(ROW).encode(),
    "another result": GOOD.replace(b"1.5", b"9.5"),
    "another name": GOOD.replace(b"first", b"fisrt"),
    "another identity": GOOD.replace(b'"a"', b'"b"'),
    "not a number": GOOD.replace(b"1.5", b"NaN"),
    "two lines in one": GOOD + GOOD,
    "half a line and another": GOOD[:-9] + GOOD,
    "a checksum of nothing": b'{"sha256": null}',
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_row_is_measured_again_and_those_around_it_are_not(how, tmp_path):
    path = tmp_path / "rows.jsonl"
    second = json.dumps(sealed(ROW | {"name": "second", "result": 2})).encode()
    path.write_bytes(second + b"\n" + DAMAGED[how])
    for _ in range(2):
        journal = Journal(path, {"model": "a"})
        assert journal.once("first", {"n": 1}, lambda: {"values": [7]})["result"] == {"values": [7]}
        assert journal.once("second", {"n": 1}, lambda: 0)["result"] == 2


def test_ends_of_lines_within_texts_end_no_row(tmp_path):
    for _ in range(2):
        row = Journal(tmp_path / "rows.jsonl", {}).once("a", {}, lambda: "one\u2028two\x85three\r\nfour")
        assert row["result"] == "one\u2028two\x85three\r\nfour"
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1


def test_what_cannot_be_read_or_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(OSError, match="journal .*rows.jsonl cannot be read .*move away"):
        Journal(tmp_path / "rows.jsonl", {})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path / "full.jsonl", {})
    journal.once("a", {}, lambda: 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"full.jsonl could not be written \(No space left .*free some space"):
        journal.once("b", {}, lambda: 2)
    monkeypatch.undo()
    assert Journal(tmp_path / "full.jsonl", {}).once("a", {}, lambda: 0)["result"] == 1


@fuzz(60)
@given(data=st.data())
def test_no_damage_whatever_makes_a_wrong_row_or_another_error(data):
    expected = {f"row {number}": [number, "text é"] for number in range(3)}
    lines = [json.dumps(sealed(ROW | {"name": name, "result": result})) for name, result in expected.items()]
    content = bytearray("".join(line + "\n" for line in lines).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = min(start + data.draw(st.sampled_from([0, 1, 1, 4, 200])), len(content))
        content[start:end] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"\n", b"\0" * 64, b'"', b"}{", b"[" * 9999])
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(bytes(content))
        for _ in range(2):
            journal = Journal(path, {"model": "a"})
            rows = [journal.once(name, {"n": 1}, partial(expected.get, name)) for name in expected]
            assert [row["result"] for row in rows] == list(expected.values())
        assert all(
            Journal(path, {"model": "a"}).once(name, {"n": 1}, pytest.fail)["name"] == name for name in expected
        )
