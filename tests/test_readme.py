"""Every block of the README is run, or is the command of a recipe that exists; the commands of docs/ too."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from elm_trainer import ElmConfig, SynthesisConfig


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
ALL_BLOCKS = [
    block for page in PAGES for block in re.findall(r"```(\w+)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
]
COMMANDS = [
    shlex.split(line, comments=True)
    for language, code in ALL_BLOCKS
    if language in ("bash", "shell")
    for line in code.replace("\\\n", " ").strip().splitlines()
]
SCRIPTS = sorted({word for words in COMMANDS for word in words if re.fullmatch(r"(examples|benchmarks)/.+\.py", word)})


@pytest.mark.slow
def test_the_quickstart_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    python = [code for language, code in BLOCKS if language == "python"]
    assert python
    for code in python:
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "outputs" / "quickstart" / "adapter" / "adapter_config.json").exists()


def test_the_commands_name_files_and_targets_that_exist():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert COMMANDS
    for words in COMMANDS:
        if words and words[0] == "make":
            assert words[1] in targets
        for word in words:
            if word.endswith((".py", ".yaml")):
                assert (ROOT / word).exists(), word


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_use_options_that_exist(script):
    printed = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"--\w+", printed.stdout)) | {"--config"}
    # A config's fields are named by it alone, so that help does not wait for torch.
    for config in (ElmConfig, SynthesisConfig):
        if f"`{config.__name__}`" in printed.stdout:
            known |= {f"--{name}" for name in config.__dataclass_fields__}
    for words in COMMANDS:
        if script in words:
            # What stands before the script is for its launcher.
            own = words[words.index(script) + 1 :]
            assert {word.split("=")[0] for word in own if word.startswith("--")} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_readme_is_short_and_names_files_that_exist():
    assert len(README.splitlines()) <= 150
    named = re.findall(r"`((?:elm_trainer|examples|recipes|docs)/[\w./-]+)`", README)
    assert named and all((ROOT / name).exists() for name in named)


def test_the_python_blocks_of_the_pages_import_names_that_exist():
    import elm_trainer

    python = [code for language, code in ALL_BLOCKS if language == "python"]
    for code in python:
        compile(code, "page", "exec")
        for names in re.findall(r"^from elm_trainer import (.+)$", code, re.MULTILINE):
            assert all(hasattr(elm_trainer, name.strip()) for name in names.split(","))


def test_the_diff_applies_to_real_names():
    import trl

    import elm_trainer

    [diff] = [code for language, code in BLOCKS if language == "diff"]
    for sign, module in (("-", trl), ("+", elm_trainer)):
        for name in re.findall(rf"^\{sign}.*?(\w+(?:Trainer|Config))\(", diff, re.MULTILINE):
            assert hasattr(module, name)


def test_the_diff_makes_a_dataset_of_a_concept_of_ones_own(tmp_path, monkeypatch):
    from elm_trainer import ConceptSources, build_erasure_dataset, load_concept

    [diff] = [code for language, code in BLOCKS if language == "diff"]
    [line] = re.findall(r"^\+dataset = (.*)$", diff, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "Brannock dyes its wool with madder."}\n')
    dataset = eval(line, {"build_erasure_dataset": build_erasure_dataset, "ConceptSources": ConceptSources})
    assert set(dataset["forget"]) == {"Brannock dyes its wool with madder."}
    assert [load_concept(name).name for name in dataset.unique("concept")] == dataset.unique("concept")
