"""What the documents for contributors and citations name is there."""

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import elm_trainer


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ("architecture.md", "papers.md")
# Classes of other libraries that the pages name.
OTHERS = {"SFTTrainer", "TrainingArguments", "TrlParser", "Trainer", "Dataset"}
BLOCK_START = re.compile(r"\s*(\||\d+\. |- |#)")


def blocks(page: str) -> list[str]:
    """The rows of tables, list items and paragraphs of a page, without what stands in code blocks."""
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = [""]
    for line in text.splitlines():
        if not line.strip() or BLOCK_START.match(line):
            found.append("")
        found[-1] += line + "\n"
    return found


def spans(block: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", block)


def files_in(block: str) -> list[Path]:
    return [ROOT / span for span in spans(block) if span.startswith("elm_trainer/") and span.endswith(".py")]


@cache
def defined(path: Path) -> frozenset[str]:
    """Functions, classes, methods (`Class.method`) and constants of a file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            names |= {node.name, *(f"{node.name}.{method}" for method in methods)}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


@cache
def everywhere() -> frozenset[str]:
    paths = [*(ROOT / "elm_trainer").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    return frozenset().union(*map(defined, paths))


def pinned(name: str) -> dict[str, str]:
    lines = (line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
    return {package.lower().replace("_", "-"): version for package, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_folders_that_a_page_names_exist(page):
    named = {span for block in blocks(page) for span in spans(block) if re.match(r"[\w.-]+/[\w./-]*$", span)}
    assert len(named) > 10
    assert not {name for name in named if not (ROOT / name).exists()}


@pytest.mark.parametrize("page", PAGES)
def test_functions_that_a_page_names_are_in_the_files_named_beside_them(page):
    checked, missing = 0, []
    for block in blocks(page):
        paths = files_in(block)
        known = frozenset().union(*map(defined, paths)) if paths else everywhere()
        for span in spans(block):
            if function := re.fullmatch(r"([\w.]+)\(\)", span):
                checked += 1
                missing += [f"{function[1]}: {block.strip()}"] if function[1] not in known else []
    assert checked > 20
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_classes_and_constants_that_a_page_names_exist(page):
    named = {span for block in blocks(page) for span in spans(block)}
    named = {name for name in named if re.fullmatch(r"[A-Z][a-z]+[A-Za-z]+|[A-Z]{3,}", name)}
    assert not named - everywhere() - OTHERS


def test_the_map_names_every_file_of_the_package():
    named = {path for block in blocks("architecture.md") for path in files_in(block)}
    files = {path for path in (ROOT / "elm_trainer").rglob("*.py") if path.name != "__init__.py"}
    assert not {str(path.relative_to(ROOT)) for path in files - named}


def test_the_tests_that_hold_an_equation_exist():
    named = {span for block in blocks("papers.md") for span in spans(block) if span.startswith("test_")}
    there = set()
    for path in (ROOT / "tests").rglob("*.py"):
        there |= set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) > 30
    assert not {name for name in named if not name.endswith(".py")} - there


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_pages_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.*)", text, re.M)
    }
    links = re.findall(r"\]\((?!https?:)(.*?)\)", text)
    assert not [link for link in links if link.startswith("#") and link[1:] not in headings]
    assert not [link for link in links if not link.startswith("#") and not (DOCS / link).exists()]


def test_the_pages_of_the_navigation_exist():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert not [page for page in named if not (DOCS / page).exists()]
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} == set(named)


def test_the_reference_has_every_public_name_once():
    shown = re.findall(
        r"^::: elm_trainer\.(\w+)$", "\n".join(path.read_text() for path in DOCS.glob("api/*.md")), re.M
    )
    assert sorted(shown) == sorted(set(elm_trainer.__all__) - {"__version__"})


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    assert citation["version"] == elm_trainer.__version__
    [paper] = citation["references"]
    assert {"type", "title", "authors", "year"} <= paper.keys() and paper["url"].endswith("2410.02760")
    assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])


def test_the_first_released_version_of_the_changelog_is_the_packages():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", text, re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    released = headings[1:]
    assert released[0][0] == elm_trainer.__version__ and all(
        re.fullmatch(r"\d{4}-\d\d-\d\d", day) for _, day in released
    )
    assert released[0][1] == str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["date-released"])
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= {
        "Added",
        "Changed",
        "Deprecated",
        "Removed",
        "Fixed",
        "Security",
    }


def test_the_hooks_run_the_pinned_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [revision] = [repository["rev"] for repository in hooks if "ruff" in repository["repo"]]
    assert revision == f"v{pinned('constraints.txt')['ruff']}"


def test_the_oldest_libraries_of_ci_are_the_floors_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = pinned("constraints-oldest.txt")
    floors = {}
    for requirement in map(Requirement, project["dependencies"]):
        [floor] = [part.version for part in requirement.specifier if part.operator == ">="]
        floors[requirement.name.lower()] = floor
    assert {name: Version(version) for name, version in floors.items()} == {
        name: Version(version) for name, version in oldest.items()
    }


@pytest.mark.parametrize(
    "libraries, constraints",
    [("oldest", "constraints-oldest.txt"), ("pinned", "constraints.txt"), ("newest", "/dev/null")],
)
def test_ci_makes_an_environment_of_each_set_of_libraries(libraries, constraints):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert libraries in {entry["libraries"] for entry in job["strategy"]["matrix"]["include"]}
    assert {"run": "make ${{ matrix.libraries }}"} in job["steps"]
    said = subprocess.run(["make", "-n", libraries], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    python = rf"\.venv-{libraries}/bin/python -m"
    for package in ("torch", r"--editable '\.\[dev\]'"):
        assert re.search(
            rf"^{python} pip install .*--constraint {re.escape(constraints)} {package}$", said, re.MULTILINE
        )
    assert re.search(rf'{python} pytest -m "not slow and not distributed"', said)
