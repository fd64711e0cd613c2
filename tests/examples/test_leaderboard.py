import subprocess
import sys
from pathlib import Path

import pytest

from elm_trainer.hub.card import make_card
from tests.hub.cards import example_report


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_leaderboard_is_printed_and_written(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text(str(make_card(example_report(), "alice/one")))
    command = [sys.executable, "examples/leaderboard.py", "--sort=r_ppl", f"--output={tmp_path / 'board.md'}"]
    command += ["--repos", str(tmp_path / "adapter"), str(tmp_path)]
    run = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env={"COLUMNS": "250", "PATH": ""}
    )
    assert "1.417" in run.stdout and f"Skipped {tmp_path}: " in run.stdout
    assert "| 1.417 |" in (tmp_path / "board.md").read_text()
