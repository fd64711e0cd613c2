import errno
import json
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest

from elm_trainer.files import UNFINISHED, append_line, replacing, write_json, write_text


def write_often(path, name):
    for _ in range(60):
        write_json(path, {"name": name, "padding": "x" * (100_000 if name else 10)})


def append_often(path, name):
    for number in range(40):
        append_line(path, json.dumps({"name": name, "number": number, "padding": "x" * 20_000}))


def in_two_processes(work):
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        for done in [pool.submit(work, name) for name in (0, 1)]:
            done.result(timeout=60)


def test_two_processes_write_one_file_and_it_is_always_that_of_one(tmp_path):
    path = tmp_path / "report.json"
    in_two_processes(partial(write_often, path))
    assert json.loads(path.read_text())["name"] in (0, 1)
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_add_lines_to_one_file_and_none_is_torn(tmp_path):
    path = tmp_path / "rows.jsonl"
    in_two_processes(partial(append_often, path))
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    assert sorted((row["name"], row["number"]) for row in rows) == [(n, i) for n in (0, 1) for i in range(40)]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    precious, path = tmp_path / "precious", tmp_path / "report.json"
    precious.write_text("precious")
    path.symlink_to(precious)
    write_json(path, {})
    assert precious.read_text() == "precious" and not path.is_symlink()

    rows = tmp_path / "rows.jsonl"
    rows.symlink_to(precious)
    with pytest.raises(OSError, match="rows.jsonl could not be written"):
        append_line(rows, "{}")
    assert precious.read_text() == "precious"


def test_a_new_file_has_the_mode_of_any_other_and_an_old_one_keeps_its_own(tmp_path):
    (tmp_path / "other").write_text("")
    write_text(tmp_path / "new", "")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "other").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    write_text(tmp_path / "new", "again")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_leaves_the_earlier_file_and_nothing_beside_it(call, tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_json(path, {"earlier": True})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((Path, "open") if call == "open" else (os, call)), full)
    with pytest.raises(
        OSError, match=r"report\.json could not be written \(No space left on device\): free"
    ) as raised:
        write_json(path, {"earlier": False})
    monkeypatch.undo()

    assert raised.value.errno == errno.ENOSPC
    assert json.loads(path.read_text()) == {"earlier": True} and list(tmp_path.iterdir()) == [path]


def test_what_is_interrupted_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "folder") as unfinished:
        unfinished.mkdir()
        (unfinished / "half").write_text("")
        assert unfinished.name.startswith(UNFINISHED)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_file_and_folder_are_on_the_disk_before_the_name_is_theirs(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (calls.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_text(tmp_path / "a.json", "{}")
    assert [Path(call).name[:9] for call in calls] == [UNFINISHED, "replace", tmp_path.name[:9]]


def test_a_line_stands_apart_from_the_half_line_before_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"ha')
    append_line(path, "{}")
    append_line(path, "{}")
    assert path.read_text() == '{"ha\n{}\n{}\n'
