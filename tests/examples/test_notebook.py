"""The notebook runs from top to bottom, and is kept without what a run has printed."""

import ast
import json
import re
from pathlib import Path

import pandas
import pytest


ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "examples" / "erase.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
PROSE = "".join("".join(cell["source"]) + "\n" for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")


def run(cell, names):
    """Run a cell, and give what its last line shows."""
    *body, last = ast.parse(cell).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], None
    exec(compile(ast.Module(body, []), "erase.ipynb", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "erase.ipynb", "eval"), names)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    shown = [run(cell, names) for cell in CODE]
    assert (tmp_path / "outputs" / "notebook" / "adapter" / "adapter_model.safetensors").is_file()
    losses, answers, measured = (table for table in shown if isinstance(table, pandas.DataFrame))
    assert list(losses.index) == [2, 4, 6] and losses.notna().all(axis=None)
    assert (answers["before"] != answers["after"]).any() and (answers != "").all(axis=None)
    assert {"reference", "erased", "n"} == set(measured.columns) and "multiple_choice.capitals.pmi" in measured.index


def test_it_is_kept_without_outputs_in_the_format_that_names_its_cells():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)(.*?)\)", PROSE)
    assert links and all((ROOT / "examples" / link).exists() for link in links)
