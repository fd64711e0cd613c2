"""List the recipes that ship with the package, or print one: `elm recipes smollm2-135m-capitals`."""

import re
import sys
from difflib import get_close_matches
from pathlib import Path

import elm_trainer

from .main import COMMANDS, OneLineParser


def recipes_folder() -> Path:
    """Where the recipes are: in the installed package, or beside the package in a checkout."""
    package = Path(elm_trainer.__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes, which `--recipe` takes."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def command_of(name: str) -> str:
    """The subcommand that a recipe is for: the one with which its name begins, or else `erase`."""
    first = name.partition("-")[0]
    return first if first in COMMANDS else "erase"


def find_recipe(name: str, command: str | None = None) -> Path:
    """The file of a recipe; raises `ValueError` if there is none, or it is not for the subcommand that is to run it."""
    names = recipe_names()
    if name not in names:
        if Path(name).is_file():
            raise ValueError(f"`recipe` is {name!r}, a file: give it as `--config {name}`.")
        near = get_close_matches(name, names, n=1)
        fix = f"did you mean {near[0]!r}?" if near else "`elm recipes` lists those that do."
        raise ValueError(f"`recipe` is {name!r}, which does not exist; {fix}")
    # What `elm doctor` looks at is an erasure.
    if command not in (None, command_of(name)) and (command, command_of(name)) != ("doctor", "erase"):
        raise ValueError(f"`recipe` is {name!r}, for `elm {command_of(name)}`: it is no recipe of `elm {command}`.")
    return recipes_folder() / f"{name}.yaml"


def shipped(path: str) -> str:
    """A path such as `recipes/attacks/compare.yaml`, within the package where there is no such file here."""
    first, _, rest = path.partition("/")
    inside = recipes_folder() / rest
    return str(inside) if first == "recipes" and not Path(path).exists() and inside.is_file() else path


def recipe_text(path: Path) -> str:
    """A recipe that stands alone: in place of the line `base`, at its end what it takes from there."""
    own = path.read_text(encoding="utf-8")
    named = re.search(r"^base: *(\S+)\n", own, re.MULTILINE)
    if named is None:
        return own
    here = set(re.findall(r"^(\w+):", own, re.MULTILINE))
    taken, takes = [], True
    for line in (path.parent / named[1]).read_text(encoding="utf-8").splitlines(keepends=True):
        # What is indented belongs to the key above it.
        if not line.startswith((" ", "-")):
            key = re.match(r"(\w+):", line)
            takes = key is None or key[1] not in here
        taken.append(line if takes else "")
    return own.replace(named[0], "") + "\n" + "".join(taken)


def main(argv: list[str] | None = None) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    parser = OneLineParser("elm recipes", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="The recipe to print; all are listed without one.")
    name = parser.parse_args(argv).name
    if name is not None:
        sys.stdout.write(recipe_text(find_recipe(name)))
        return
    table = Table(*(Column(name, no_wrap=True) for name in ("name", "subcommand")), "what it does", box=None)
    for found in recipe_names():
        table.add_row(found, command_of(found), _about(find_recipe(found)))
    Console().print(table)


def _about(path: Path) -> str:
    """The first sentence of the first line, which is a comment."""
    line = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()
    return line.partition(". ")[0].rstrip(".")
