import json

import pytest

from elm_trainer.files import MissingRunError, Runs


DEPENDS = {"method": "elm", "seed": 0}
DAMAGES = {
    "cut": lambda content: content[:-9],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "no text": lambda content: b"\xff" + content,
    "another value": lambda content: content.replace(b"1.5", b"9.5"),
    "no result": lambda content: b'{"depends": {}}',
    "a list": lambda content: b"[]",
    "deep": lambda content: b"[" * 100_000,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_run_is_run_again(how, tmp_path):
    runs = Runs(tmp_path)
    assert runs.once("final", DEPENDS, lambda: {"value": 1.5}) == {"value": 1.5}
    [path] = tmp_path.iterdir()
    path.write_bytes(DAMAGES[how](path.read_bytes()))
    with pytest.raises(MissingRunError, match="or is damaged"):
        Runs(tmp_path, only_read=True).once("final", DEPENDS, dict)
    assert runs.once("final", DEPENDS, lambda: {"value": 2}) == {"value": 2}
    assert runs.once("final", DEPENDS, pytest.fail) == {"value": 2}


def test_a_run_of_before_without_a_checksum_is_read(tmp_path):
    path = Runs(tmp_path).path("final", DEPENDS).with_suffix(".json")
    path.write_text(json.dumps({"depends": DEPENDS, "result": {"value": 3}}))
    assert Runs(tmp_path).once("final", DEPENDS, pytest.fail) == {"value": 3}


def test_a_folder_in_place_of_a_run_is_named(tmp_path):
    Runs(tmp_path).path("final", DEPENDS).with_suffix(".json").mkdir()
    with pytest.raises(OSError, match="final-.*json could not be written"):
        Runs(tmp_path).once("final", DEPENDS, dict)
