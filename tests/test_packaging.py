"""The wheel and the source distribution as they would be uploaded."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with both, built from a copy, so that nothing is left beside the sources."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    for name in ("elm_trainer", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for kind in ("wheel", "sdist"):
        code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(output)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return output


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
