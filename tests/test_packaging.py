"""The wheel and the source distribution as they would be uploaded."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from elm_trainer.cli.recipes import recipe_text


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with both, built from a copy, so that nothing is left beside the sources."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "setup.py"):
        shutil.copy(ROOT / name, source)
    for name in ("elm_trainer", "docs", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for kind in ("wheel", "sdist"):
        code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(output)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return output


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """A virtual environment outside the repository with the wheel in it; the libraries are those of this one."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place, symlinks=os.name != "nt")
    scripts = place / ("Scripts" if os.name == "nt" else "bin")
    [wheel] = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "--disable-pip-version-check", "install"]
    # Away from this checkout, which pip would take for an installed package.
    installing = run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], place)
    assert not installing.returncode, installing.stderr
    # Only what stands in this folder is found, not what it installs in editable form.
    [package] = place.glob("**/site-packages/elm_trainer")
    (package.parent / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return scripts


def run(command, folder):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_has_the_recipes_and_the_console_script_finds_them(installed, tmp_path):
    code = "import time; started = time.perf_counter(); import elm_trainer; print(time.perf_counter() - started)"
    code += "\nfrom elm_trainer.cli.recipes import shipped; print(elm_trainer.__file__, shipped('recipes/attacks/compare.yaml'))"
    seconds, *found = run([installed / "python", "-c", code], tmp_path).stdout.split()
    assert float(seconds) <= 0.3
    assert len(found) == 2 and all(Path(path).is_relative_to(installed.parent) for path in found)

    recipes = Path(found[1]).parents[1]
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert (recipes / path.relative_to(ROOT / "recipes")).read_bytes() == path.read_bytes()
    for name in ("smollm2-135m-capitals", "zephyr-7b-beta-bio-cyber-released"):
        printed = run([installed / "elm", "recipes", name], tmp_path).stdout
        assert printed == recipe_text(ROOT / "recipes" / f"{name}.yaml")
    wrong = run([installed / "elm", "erase", "--recipe", "smollm2-135m-capital"], tmp_path)
    assert wrong.returncode == 2 and wrong.stderr.endswith("did you mean 'smollm2-135m-capitals'?\n")


@pytest.mark.slow
def test_the_wheel_erases_by_a_recipe(installed, tmp_path, tiny_model, tokenizer):
    tiny_model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    smaller = {
        "model": "tiny", "output_dir": "out", "targets_dir": "targets", "dataset_size": 16, "max_steps": 2,
        "lora_layers": "0-1", "state_layers": 1, "questions": 8,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in smaller.items()]
    erased = run([installed / "elm", "erase", "--recipe", "smollm2-135m-capitals", *options], tmp_path)
    assert erased.returncode == 0, erased.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["lora_rank"] == 64 and report["recipe"]["dataset_size"] == 16
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_the_wheel_says_who_made_it_for_whom_and_where_to_read_on(built):
    [path] = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(wheel.read(name).decode())
        assert "elm_trainer/hub/templates/model_card.md" in wheel.namelist()
    assert "maintainers" in metadata["Author"] and metadata["License-Expression"] == "Apache-2.0"
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    assert urls["Paper"].startswith("https://arxiv.org/") and all(url.startswith("https://") for url in urls.values())
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers and "Programming Language :: Python :: 3.11" in classifiers


def test_the_pictures_of_the_readme_are_absolute_or_ship(built):
    [path] = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", readme)
    assert pictures and all(picture.startswith("https://") or picture in shipped for picture in pictures)
