"""The shape of the package: no circles, imports only downwards, nothing private taken across files, few files of bounded length."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import elm_trainer


PACKAGE = Path(elm_trainer.__file__).parent
MOST_FILES, MOST_LINES = 116, 400

# The modules and folders of each layer, and the layers below that it may import, the lowest layer first.
LAYERS = {
    "base": (
        "checks",
        "files",
        "run_lock",
        "distributed",
        "fingerprint",
        "concept",
        "modeling",
        "fitting",
    ),
    "ops": ("head", "objectives"),
    "data": ("data",),
    "evaluation": ("evaluation",),
    "metrics": ("metrics",),
    "synthesis": ("synthesis",),
    "methods": ("methods",),
    "making": ("making",),
    "rehearsal": ("rehearsal", "watch"),
    "attacks": ("attacks",),
    "gold_standard": ("gold_standard",),
    "comparison": ("comparison",),
    "hub": ("hub",),
    "chat": ("chat", "chat_page"),
    "cli": ("cli", "__main__"),
}
MAY_IMPORT = {
    "base": (),
    "ops": ("base",),
    "data": ("base", "ops"),
    "evaluation": ("base", "ops", "data"),
    "metrics": ("base", "ops", "data", "evaluation"),
    "synthesis": ("base", "ops", "data", "evaluation"),
    "methods": ("base", "ops", "data", "synthesis"),
    "making": ("base", "ops", "data", "evaluation", "synthesis", "methods"),
    "rehearsal": ("base", "ops", "data", "methods"),
    "attacks": ("base", "ops", "data", "evaluation"),
    "gold_standard": ("base", "ops", "data", "evaluation", "methods", "attacks"),
    "comparison": ("base", "ops", "data", "evaluation", "methods", "attacks"),
    # It reads reports and settings from files, and knows no method.
    "hub": ("base", "ops", "data", "evaluation", "synthesis", "attacks"),
    "chat": ("base", "ops", "data", "evaluation", "attacks"),
    # Nothing in the package imports the subcommands.
    "cli": tuple(layer for layer in LAYERS if layer != "cli"),
}
# The package itself, whose names stand for all of them.
TOP = "the package itself"
# Trainers publish, and warn of what cannot be loaded, as their users do it: through the names of the package. So does all of `cli`.
FRONT_DOOR_USERS = ("elm_trainer.methods.base", "elm_trainer.methods.validation")


class Import(NamedTuple):
    """A module that another one imports."""

    file: str
    line: int
    importer: str
    imported: str

    def __str__(self):
        return f"{self.file}:{self.line}"


class Package:
    """The imports of a package, those within functions too, and those for type checkers left out.

    Args:
        root (`Path`): Its folder.
    """

    def __init__(self, root: Path):
        self.root = root
        self.paths = {self._module(path): path for path in sorted(root.rglob("*.py"))}
        self.imports: list[Import] = []
        self.private: list[str] = []
        for module, path in self.paths.items():
            self._read(module, path)

    def file(self, path: Path) -> str:
        return path.relative_to(self.root.parent).as_posix()

    def circles(self) -> list[str]:
        """Modules that import each other, such as `p.a -> p.b -> p.a`; one of the imports of each circle is then left out."""
        graph: dict[str, set[str]] = {}
        for found in self.imports:
            graph.setdefault(found.importer, set()).add(found.imported)
        circles = []
        while True:
            try:
                TopologicalSorter(graph).prepare()
            except CycleError as error:
                # Each is imported by the next.
                chain = error.args[1][::-1]
                circles.append(" -> ".join(chain))
                graph[chain[0]].discard(chain[1])
            else:
                return circles

    def upward(self) -> list[str]:
        """Imports that the order of layers forbids."""
        problems = [
            f"{self.file(path)} belongs to no layer: name it in `LAYERS`."
            for module, path in self.paths.items()
            if self.layer(module) is None
        ]
        for found in self.imports:
            layers = own, other = self.layer(found.importer), self.layer(found.imported)
            front_door = other == TOP and (found.importer in FRONT_DOOR_USERS or own == "cli")
            if None in layers or own in (other, TOP) or front_door:
                continue
            if other not in (allowed := MAY_IMPORT[own]):
                problems.append(
                    f"{found} (layer {own}) imports {found.imported} (layer {other}): {own} may only import "
                    f"{', '.join((own, *allowed))}."
                )
        return problems

    def layer(self, module: str) -> str | None:
        """The layer of a module; `None` if it has none."""
        if module == self.root.name:
            return TOP
        part = module.split(".")[1]
        return next((layer for layer, parts in LAYERS.items() if part in parts), None)

    def too_long(self) -> list[str]:
        """Files over the limit, with their lines."""
        lengths = {self.file(path): len(path.read_text().splitlines()) for path in self.paths.values()}
        return [f"{file} has {lines} lines" for file, lines in lengths.items() if lines > MOST_LINES]

    def _module(self, path: Path) -> str:
        parts = path.relative_to(self.root.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _read(self, module: str, path: Path) -> None:
        bound: dict[str, str] = {}
        nodes = list(_run_nodes(ast.parse(path.read_text())))
        for node in nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == self.root.name:
                        self._note(module, path, node, alias.name)
                        bound[alias.asname or self.root.name] = alias.name if alias.asname else self.root.name
            elif isinstance(node, ast.ImportFrom) and (source := self._source(module, path, node)):
                for alias in node.names:
                    name = f"{source}.{alias.name}"
                    # A module of the folder, or something that a module holds.
                    self._note(module, path, node, name if name in self.paths else source)
                    if name in self.paths:
                        bound[alias.asname or alias.name] = name
                    if _is_private(alias.name):
                        self._note_private(path, node, name)
        for node in nodes:
            if isinstance(node, ast.Attribute) and _is_private(node.attr):
                if (holder := self._held(node.value, bound)) and holder != module:
                    self._note_private(path, node, f"{holder}.{node.attr}")

    def _source(self, module: str, path: Path, node: ast.ImportFrom) -> str | None:
        """The full name of what `from` names; `None` outside the package."""
        if node.level:
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + (path.name == "__init__.py")]
            return ".".join([*parts, *([node.module] if node.module else [])])
        return node.module if node.module and node.module.split(".")[0] == self.root.name else None

    def _held(self, node: ast.expr, bound: dict[str, str]) -> str | None:
        """The module that an expression such as `package.module` stands for."""
        if isinstance(node, ast.Name):
            return bound.get(node.id)
        if isinstance(node, ast.Attribute) and (holder := self._held(node.value, bound)):
            return name if (name := f"{holder}.{node.attr}") in self.paths else None
        return None

    def _note(self, module: str, path: Path, node: ast.stmt, imported: str) -> None:
        if (found := Import(self.file(path), node.lineno, module, imported)) not in self.imports:
            self.imports.append(found)

    def _note_private(self, path: Path, node: ast.AST, name: str) -> None:
        self.private.append(f"{self.file(path)}:{node.lineno} takes {name}, which is private to its file.")


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that may run: what stands under `if TYPE_CHECKING` does not."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).rpartition(".")[2] == "TYPE_CHECKING":
            for other in child.orelse:
                yield other
                yield from _run_nodes(other)
            continue
        yield child
        yield from _run_nodes(child)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


@pytest.fixture(scope="module")
def package():
    return Package(PACKAGE)


def told(problems):
    return "\n" + "\n".join(problems)


def test_no_module_imports_itself_in_a_circle(package):
    assert not (circles := package.circles()), told(circles)


def test_imports_go_only_downwards(package):
    assert not (problems := package.upward()), told(problems)


def test_nothing_private_is_taken_across_files(package):
    assert not package.private, told(package.private)


def test_no_file_is_long(package):
    assert not (problems := package.too_long()), told(problems)


def test_there_are_few_files(package):
    count = len(package.paths)
    assert count <= MOST_FILES, f"The package has {count} files: put what belongs together into one."


@pytest.fixture
def made_up(tmp_path):
    """Makes a package of files given by name, with sound ones beside them."""

    def make(**files):
        texts = {
            "__init__.py": "from .hub.load import load\n",
            "files.py": "def write(): ...\ndef _sync(): ...\n",
            "data/__init__.py": "",
            "data/rows.py": "from ..files import write\n",
            "hub/__init__.py": "",
            "hub/load.py": "from ..data.rows import write\n\ndef load(): ...\n",
        }
        for name, text in (texts | {name.replace("__", "/") + ".py": text for name, text in files.items()}).items():
            path = tmp_path / "house" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Package(tmp_path / "house")

    return make


def test_a_sound_package_has_no_problems(made_up):
    house = made_up(
        data__typed="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..hub.load import load\n",
        hub__stage="from .. import files\nfrom . import load\nimport house.files as f\nfiles.__name__, f.write, f.write._x\n",
    )
    assert house.circles() == house.upward() == house.private == house.too_long() == []
    assert [(found.importer, found.imported) for found in house.imports] == [
        ("house", "house.hub.load"),
        ("house.data.rows", "house.files"),
        ("house.hub.load", "house.data.rows"),
        ("house.hub.stage", "house.files"),
        ("house.hub.stage", "house.hub.load"),
        ("house.hub.stage", "house.files"),
    ]


@pytest.mark.parametrize(
    "text", ["from .second import b\n", "def a():\n    from . import second\n", "import house.data.second\n"]
)
def test_a_circle_is_reported(text, made_up):
    house = made_up(data__first=text, data__second="from .third import c\n", data__third="from .first import a\n")
    [circle] = house.circles()
    chain = circle.split(" -> ")
    assert chain[0] == chain[-1]
    assert [*chain, *chain[1:]][chain.index("house.data.first") :][:4] == [
        f"house.data.{name}" for name in ("first", "second", "third", "first")
    ]


def test_two_circles_are_both_reported(made_up):
    house = made_up(
        data__a="from .b import x\n",
        data__b="from .a import x\n",
        hub__c="from .d import x\n",
        hub__d="from .c import x\n",
    )
    assert sorted({*circle.split(" -> ")} for circle in house.circles()) == sorted(
        [{"house.data.a", "house.data.b"}, {"house.hub.c", "house.hub.d"}]
    )


@pytest.mark.parametrize(
    "text",
    [
        "from ..hub.load import load\n",
        "from house.hub import load\n",
        "import house.hub.load\n",
        "def lazy():\n    try:\n        from ..hub import load\n    except ImportError:\n        pass\n",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from ..hub.load import load\n",
    ],
)
def test_an_upward_import_is_reported_with_the_rule(text, made_up):
    house = made_up(data__rows=text)
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "load" in line)
    assert house.upward() == [
        f"house/data/rows.py:{line} (layer data) imports house.hub.load (layer hub): data may only import data, base, ops."
    ]


def test_an_import_of_the_package_itself_is_reported(made_up):
    [problem] = made_up(data__rows="from .. import load\n").upward()
    assert problem.startswith(
        "house/data/rows.py:1 (layer data) imports house (layer the package itself): data may only"
    )


def test_a_file_without_a_layer_is_reported(made_up):
    assert made_up(attic="").upward() == ["house/attic.py belongs to no layer: name it in `LAYERS`."]


@pytest.mark.parametrize(
    "text",
    [
        "from ..files import write, _sync\n",
        "from .. import files\nfiles._sync()\n",
        "import house.files\nhouse.files._sync()\n",
        "import house.files as f\ndef g():\n    return f._sync\n",
    ],
)
def test_a_private_name_of_another_file_is_reported(text, made_up):
    [problem] = made_up(data__rows=text).private
    assert problem.startswith("house/data/rows.py:") and problem.endswith(
        " takes house.files._sync, which is private to its file."
    )


def test_a_long_file_is_reported(made_up):
    house = made_up(data__rows="x = 1\n" * MOST_LINES, data__more="x = 1\n" * (MOST_LINES + 1))
    assert house.too_long() == [f"house/data/more.py has {MOST_LINES + 1} lines"]


def test_layers_import_only_layers_that_come_before_them():
    names = [*LAYERS]
    for layer, allowed in MAY_IMPORT.items():
        assert all(names.index(other) < names.index(layer) for other in allowed), layer


def test_type_checkers_and_the_api_reference_see_every_public_name():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    [exports] = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS"
    ]
    [typed] = [node.body for node in tree.body if isinstance(node, ast.If)]
    assert {name.name: f".{line.module}" for line in typed for name in line.names} == ast.literal_eval(exports)
