import runpy
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parents[2] / "examples" / "sample_retain.py"


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), ([], 2)])
def test_nothing_is_sampled_before_a_place_for_it_is_named(words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == code and "--output_dir" in "".join(capsys.readouterr())
