"""A griffe extension: the docstrings' types and links, which are written as in TRL, in the form that mkdocstrings reads."""

import re
from collections.abc import Collection
from typing import Any

import griffe

import elm_trainer


_PARAMETERS = re.compile(r"^( *)(\w+(?:, \w+)+)((?: \(.+?\))?: .*)$", re.MULTILINE)
_TYPE = re.compile(r"^( *\*{0,2}\w+) \((.+?)\):", re.MULTILINE)
_RESULT = re.compile(r"((?:Returns|Yields):\n\s+)\[?`~?([^`\n]+)`\]?:")
_LINK = re.compile(r"\[`~?([\w.]+)`\]")
_NOTE = re.compile(r"^( *)> \[!NOTE\]\n((?: *>.*\n?)+)", re.MULTILINE)


class TrlDocstrings(griffe.Extension):
    """Turns a docstring in TRL's form into one in Google's."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every object that it has read."""
        if obj.docstring is not None:
            names = {parameter.name for parameter in getattr(obj, "parameters", ())}
            obj.docstring.value = google(obj.docstring.value, names)


def google(text: str, parameters: Collection[str] = ()) -> str:
    """The docstring with a line for each parameter, bare types, links to names that the pages show, and notes as sections."""

    def split(found: re.Match[str]) -> str:
        names = found[2].split(", ")
        return "\n".join(found[1] + name + found[3] for name in names) if {*names} <= {*parameters} else found[0]

    text = _PARAMETERS.sub(split, text)
    text = _TYPE.sub(lambda found: f"{found[1]} ({_bare(found[2])}):", text)
    text = _RESULT.sub(r"\1\2:", text)
    text = _NOTE.sub(lambda found: f"{found[1]}Note:\n" + re.sub(r"(?m)^( *)> ?", r"\1    ", found[2]), text)
    return _LINK.sub(lambda found: _link(found[1]), text)


def _bare(kind: str) -> str:
    """A type without the marks around it and without its default, which the signature shows."""
    kind = re.sub(r"\[`~?([^`]+)`\]|`", r"\1", kind)
    kind = re.sub(r", \*optional\*(, defaults to .*)?$", "", kind)
    # "A, B or C" is a choice of three, not a tuple.
    return re.sub(r", (?![^\[]*\])", " or ", kind) if " or " in kind else kind


def _link(name: str) -> str:
    short = name.rpartition(".")[2]
    return f"[`{short}`][elm_trainer.{short}]" if short in elm_trainer.__all__ else f"`{short}`"
