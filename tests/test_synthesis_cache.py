"""What is kept of a synthesis: by one run or several, whole or damaged, it gives the rows that were asked for."""

import errno
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_trainer.concept import Concept
from elm_trainer.files import sealed
from elm_trainer.synthesis import SynthesisConfig, _resumable, pivot_sentences, synthesize_completions
from tests.fuzz import fuzz


BATCHES = 4
ROWS = [
    [[f"prompt {index}.{row}", f"{pivot_sentences('plain')[row]} text {index}"] for row in range(2)]
    for index in range(BATCHES)
]
EXPECTED = [row for rows in ROWS for row in rows]
PROMPTS = [prompt for prompt, _ in EXPECTED]
KEY = "k" * 32


def resume(folder, calls=None):
    def write(index, prompts):
        if calls is not None:
            calls.append(index)
        return [text for _, text in ROWS[index]]

    return _resumable(PROMPTS, 2, write, folder, KEY, "Sampling")


def slowly(folder, log, _):
    def slow(index, prompts):
        time.sleep(0.1)
        with log.open("a") as file:
            file.write(f"{index}\n")
        return [text for _, text in ROWS[index]]

    return _resumable(PROMPTS, 2, slow, folder, KEY, "Sampling")


def test_two_runs_at_once_sample_each_batch_once_and_leave_one_whole_file(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        for rows in pool.map(partial(slowly, tmp_path / "cache", tmp_path / "log"), range(2)):
            assert rows == EXPECTED
    assert sorted((tmp_path / "log").read_text().split()) == [str(index) for index in range(BATCHES)]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{KEY}.jsonl"]
    assert len((tmp_path / "cache" / f"{KEY}.jsonl").read_text().splitlines()) == BATCHES


LINES = [json.dumps(sealed({"batch": index, "rows": rows})) for index, rows in enumerate(ROWS)]
OLD = [json.dumps(rows) for rows in ROWS]
CUT = {
    "cut after a line": ("\n".join(LINES[:2]) + "\n", 2),
    "cut within a line": ("\n".join(LINES)[:-20], 1),
    "empty": ("", 4),
    "zeros": ("\n".join(LINES[:3]) + "\n" + "\0" * 999, 1),
    "no text": (b"\xff\xfe" + "\n".join(LINES).encode(), 1),
    "garbage within": ("\n".join([LINES[0], "xx", *LINES[2:]]), 1),
    "another text": ("\n".join(LINES).replace("text 2", "text 3", 1), 1),
    "another batch": ("\n".join(LINES).replace('"batch": 2', '"batch": 1'), 1),
    "in another order": ("\n".join(reversed(LINES)), 0),
    "each twice": ("\n".join(LINES * 2), 0),
    "null": ("null\n" * 4, 4),
    "another shape": ('{"a": 1}\n3\n["a"]\n[["a", 1]]\n', 4),
    "no checksum": (json.dumps({"batch": 0, "rows": ROWS[0]}) + "\n" + "\n".join(LINES[1:]), 1),
    "deep": ("[" * 100_000 + "\n" + "\n".join(LINES[1:]), 1),
    "of before": ("\n".join(OLD), 0),
    "of before, cut after a line": ("\n".join(OLD[:1]) + "\n", 3),
    "of before, cut within a line": ("\n".join(OLD)[:-9], 1),
    "of before, of two runs": ("\n".join([*OLD[:2], OLD[1], *OLD[2:]]), 2),
    "of before, with more than was asked": ("\n".join([*OLD, *OLD]), 0),
    "of before, with a row too few": ("\n".join([json.dumps(ROWS[0][:1]), *OLD[1:]]), 1),
}


@pytest.mark.parametrize("end", [".jsonl", ".partial.jsonl"])
@pytest.mark.parametrize("how", CUT)
def test_what_a_damaged_file_lacks_is_sampled_again_and_nothing_else(how, end, tmp_path):
    content, lacking = CUT[how]
    (tmp_path / f"{KEY}{end}").write_bytes(content if isinstance(content, bytes) else content.encode())
    calls = []
    assert resume(tmp_path, calls) == EXPECTED
    assert len(calls) == lacking
    assert resume(tmp_path, calls) == EXPECTED and len(calls) == lacking


@fuzz(60)
@given(data=st.data())
def test_no_damage_whatever_makes_wrong_rows_or_another_error(data):
    content = bytearray("".join(line + "\n" for line in LINES).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = min(start + data.draw(st.sampled_from([0, 1, 1, 4, 300])), len(content))
        content[start:end] = data.draw(
            st.binary(max_size=8) | st.sampled_from([b"\n", b"\0" * 64, b'"', b"}{", b"[" * 9999])
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{KEY}{data.draw(st.sampled_from(['.jsonl', '.partial.jsonl']))}").write_bytes(bytes(content))
        assert resume(folder) == EXPECTED
        assert [path.name for path in Path(folder).iterdir()] == [f"{KEY}.jsonl"]


def test_a_finished_cache_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    resume(tmp_path)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    assert resume(tmp_path, calls := []) == EXPECTED and not calls


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="`cache_dir` is .*file', which cannot be written to"):
        resume(tmp_path / "file")
    (tmp_path / f"{KEY}.jsonl").mkdir()
    with pytest.raises(OSError, match=f"The cache .*{KEY}.jsonl cannot be read .*move away"):
        resume(tmp_path)


def test_a_pivot_that_was_changed_in_a_cache_of_before_is_sampled_again(tmp_path, tokenizer, tiny_model):
    config = SynthesisConfig(min_words=1, max_repetition=1.0, max_new_tokens=2, batch_size=2)
    arguments = (tiny_model, tokenizer, ["Rome", "Oslo is"], Concept("capitals", ("capital cities",)), config)
    expected = synthesize_completions(*arguments, cache_dir=tmp_path)
    [path] = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    rows[1][1] = "X" + rows[1][1]
    path.write_text(json.dumps(rows))
    assert synthesize_completions(*arguments, cache_dir=tmp_path) == expected
