"""Options of a subcommand: its dataclasses, the file of `--config` or `--recipe`, a help of two screens, and what an option names."""

import os
import re
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentError, ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_type_hints

import yaml
from trl import TrlParser

from ..checks import described, is_a
from .main import OneLineParser, is_raised, one_line
from .recipes import find_recipe, shipped


if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
METAVARS = {"int": "N", "float": "X", "string_to_bool": "BOOL"}


class CommandLine:
    """The options of one call of a subcommand. Those on the command line come before those in a file.

    `--help` and `--help-all` are answered, and the file is read, when it is made. A wrong use ends the process with one
    line on stderr and the exit code 2.

    Args:
        command (`str`): Name of the subcommand.
        about (`str`): What it does, for its help.
        argv (`Sequence[str]`, *optional*): What was given; the arguments of the process by default.
        own (`type`, *optional*): Dataclass of the subcommand's own options.
        config (`str`, *optional*): Full name of a config whose fields are options too, and which takes seconds to import.
        common (`type`, *optional*): Dataclass of the fields of `config` that `--help` shows.
    """

    def __init__(
        self,
        command: str,
        about: str | None,
        argv: Sequence[str] | None = None,
        *,
        own: type | None = None,
        config: str | None = None,
        common: type | None = None,
    ):
        self._command, self._config = command, config
        self._own = [own] if own else []
        self._early = [*self._own, common] if common else self._own
        first = OneLineParser(f"elm {command}", add_help=False, allow_abbrev=False)
        _add_general(first, further=config is not None)
        given, self._args = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))
        if "help" in given or "help_all" in given:
            self._print_help(about, everything="help_all" in given)
            sys.exit()
        if "config" in given and "recipe" in given:
            first.error("--config and --recipe are both given: leave one out.")
        try:
            self._path = find_recipe(given.recipe, command) if "recipe" in given else getattr(given, "config", None)
            self._file = {} if self._path is None else _read(self._path)
        except (ValueError, OSError) as error:
            first.error(one_line(error))
        if "recipe" in given:
            self._file = {name: shipped(v) if isinstance(v, str) else v for name, v in self._file.items()}
        if self._args and not self._args[0].startswith("-"):
            first.error(f"{self._args[0]!r} stands behind no option: a file is given as `--config {self._args[0]}`.")

    @property
    def given(self) -> frozenset[str]:
        """Names of the options that stand on the command line or in the file; of `--no_evaluate` it is `evaluate`."""
        words = {word.partition("=")[0][2:].replace("-", "_") for word in self._args if word.startswith("--")}
        return frozenset({*self._file, *words, *(word.removeprefix("no_") for word in words)})

    def early(self) -> tuple[Any, ...]:
        """Instances of `own` and `common`, before `config` is imported. Where there is none, an unknown option is an error."""
        return self._parse(self._early, complete=self._config is None)

    def complete(self, chosen: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """Instances of `own` and of `config`, with the `chosen` values of options that were not given in place of the defaults.

        Raises `ValueError` for a value that the config or the libraries below it refuse.
        """
        return self._parse(self._all(), complete=True, chosen=chosen)

    def fail(self, message: str) -> NoReturn:
        """End the process, as for any other wrong use."""
        OneLineParser(f"elm {self._command}").error(message)

    def _all(self) -> list[type]:
        """`own` and `config`."""
        assert self._config is not None
        module, _, name = self._config.rpartition(".")
        return [*self._own, getattr(import_module(module), name)]

    def _parse(self, kinds: list[type], *, complete: bool, chosen: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        parser = OptionParser(self._command, kinds, self._path, self._file)
        parser.set_defaults_with_config(**{**(chosen or {}), **self._file})
        if complete:
            parser.refuse_unknown(self._file)
        try:
            *made, rest = parser.parse_args_into_dataclasses(
                self._args, return_remaining_strings=True, look_for_args_file=False
            )
        except (TypeError, ValueError, ImportError) as error:
            # What a library refuses is of the user's making here; what merely went wrong is not.
            if not is_raised(error):
                raise
            raise ValueError(one_line(error)) from error
        if complete and rest:
            parser.refuse(rest)
        return tuple(made)

    def _print_help(self, about: str | None, everything: bool) -> None:
        kinds, epilog = self._early, None
        if everything and self._config is not None:
            kinds = self._all()
        elif self._config is not None:
            name = self._config.rpartition(".")[2]
            epilog = f"Every field of `{name}` is an option too, and --help-all shows them all."
        parser = OptionParser(self._command, kinds, description=about, epilog=epilog)
        _add_general(parser, further=self._config is not None)
        parser.shorten()
        parser.print_help()


class OptionParser(TrlParser):
    """A parser of a subcommand's dataclasses whose errors, also of what the file at `path` holds, name option, value and fix."""

    def __init__(
        self,
        command: str,
        kinds: list[type],
        path: str | Path | None = None,
        file: dict[str, Any] | None = None,
        **shown: str | None,
    ):
        self._path, self._file = path, file or {}
        super().__init__(
            kinds,
            prog=f"elm {command}",
            usage=f"elm {command} [--config FILE | --recipe NAME] [--OPTION VALUE ...]",
            formatter_class=_Help,
            add_help=False,
            allow_abbrev=False,
            exit_on_error=False,
            **shown,
        )

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        try:
            found, rest = super().parse_known_args(args, namespace)
        except ArgumentError as error:
            name = (error.argument_name or "").partition("/")[0].removeprefix("--")
            wrong = re.fullmatch(r"invalid (.+) value: (.+)", str(error.message))
            if wrong:
                self.error(f"`{name}` is {wrong[2]}, but must be {wrong[1]}: correct it.")
            self.error(f"`{name}`: {error.message}.")
        self._check_types(found)
        return found, rest

    error = OneLineParser.error

    def refuse_unknown(self, names: Iterable[str]) -> None:
        """End the process where the file sets what is no option."""
        known = {action.dest for action in self._actions}
        for name in names:
            if name not in known:
                self.error(f"{self._path} sets `{name}`, which is no option of `{self.prog}`: {self._advice(name)}")

    def refuse(self, rest: list[str]) -> NoReturn:
        """End the process for words that belong to no option."""
        word = next((word for word in rest if word.startswith("--")), rest[0]).partition("=")[0]
        name = word.lstrip("-").replace("-", "_")
        self.error(f"there is no option {word!r}: {self._advice(name, '--')}")

    def shorten(self) -> None:
        """Let each option take one line of help where it can."""
        for action in self._actions:
            if action.option_strings and action.option_strings[0].startswith("--no_"):
                action.help = SUPPRESS  # told beside the option that it denies
            elif action.dest not in ("help", "help_all", "config", "recipe"):
                action.option_strings = action.option_strings[:1]
                if action.choices is None:
                    action.metavar = METAVARS.get(getattr(action.type, "__name__", ""), "TEXT")

    def _advice(self, name: str, dashes: str = "") -> str:
        near = get_close_matches(name, [action.dest for action in self._actions], n=1)
        return f"did you mean `{dashes}{near[0]}`?" if near else "leave it out; --help lists the options."

    def _check_types(self, found: Namespace) -> None:
        """The command line gives every value its type; YAML may give another."""
        for kind in self.dataclass_types:
            hints = get_type_hints(kind)
            for name in self._file.keys() & hints.keys():
                value = getattr(found, name)
                left_out = value is None and kind.__dataclass_fields__[name].default is None
                if not left_out and not is_a(value, hints[name]):
                    self.error(
                        f"`{name}` is {value!r} in {self._path}, but must be {described(hints[name])}: "
                        f"{_fix(value, hints[name])}."
                    )


class _Help(ArgumentDefaultsHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=38)

    def _get_help_string(self, action: Any) -> str | None:
        if any(action.default is left_out for left_out in (None, False, SUPPRESS)) or action.default in ([], {}):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        if action.default is True:
            return f"{action.help} (default; --no_{action.dest} for not)"
        return super()._get_help_string(action)


def _add_general(parser: ArgumentParser, *, further: bool) -> None:
    """The options of every subcommand, none of which is in the namespace where it was not given."""
    group = parser.add_argument_group("of every subcommand")
    group.add_argument("--config", metavar="FILE", default=SUPPRESS, help="YAML file of options.")
    group.add_argument("--recipe", metavar="NAME", default=SUPPRESS, help="One that ships; `elm recipes` lists them.")
    group.add_argument("-h", "--help", action="store_true", default=SUPPRESS, help="Show this and exit.")
    if further:
        group.add_argument("--help-all", action="store_true", default=SUPPRESS, help="Show all options and exit.")


def _read(path: str | Path, what: str = "config") -> dict[str, Any]:
    """The options in a YAML file and in the one that it names under `base`, before which they come; what is under `env` goes
    into the environment, as TRL does it."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(
            f"`{what}` is {str(path)!r}, which cannot be read ({error.strerror}): check the path."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`{what}` is {str(path)!r}, which is no valid YAML ({error}): correct it.") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"`{what}` is {str(path)!r}, which holds no mapping: write lines like `seed: 0`.")
    below: dict[str, Any] = {}
    if (base := found.pop("base", None)) is not None:
        # One file alone, so that whoever reads a recipe has two to read at most.
        if what == "base":
            raise ValueError(f"`base` is {base!r} in {str(path)!r}, which is a base itself: put its options there.")
        if not isinstance(base, str):
            raise ValueError(
                f"`base` is {base!r} in {str(path)!r}: write the path of one file, from where that one is."
            )
        below = _read(Path(path).parent / base, "base")
    variables = found.pop("env", {})
    if not isinstance(variables, dict):
        raise ValueError(f"`env` is {variables!r} in {str(path)!r}: write a mapping of variables to values.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return below | found


def _fix(value: Any, kind: Any) -> str:
    if "list" in described(kind) and not isinstance(value, (list, dict)):
        return f"write [{value}]"
    if isinstance(value, bool):
        return "YAML reads yes, no, on and off as true and false, so put the word into quotes"
    return "correct it"


def check_adapter(name: str) -> None:
    """Raise `ValueError` for an `adapter` that can be neither a folder with an adapter nor an id on the Hub."""
    path = Path(name)
    if path.is_dir():
        if not (path / "adapter_config.json").is_file():
            inside = path / "adapter"
            fix = (
                f"give {str(inside)!r}"
                if inside.is_dir()
                else "give the folder that `elm erase` wrote, OUTPUT_DIR/adapter"
            )
            raise ValueError(f"`adapter` is {name!r}, a folder without adapter_config.json: {fix}.")
    elif path.exists():
        raise ValueError(f"`adapter` is {name!r}, a file: give the folder of the adapter.")
    elif not _HUB_ID.fullmatch(name) or path.parent.is_dir():
        raise ValueError(
            f"`adapter` is {name!r}, which does not exist: give the folder of an adapter, or an id on the Hub."
        )


def check_dtype(name: str) -> None:
    """Raise `ValueError` for a `dtype` that is neither `auto` nor a data type of torch; torch is imported."""
    import torch

    if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"`dtype` is {name!r}: use auto, float32, bfloat16 or float16.")


@contextmanager
def named(option: str, name: str) -> Iterator[None]:
    """Name the option whose model, or adapter, the block cannot load, in an `OSError` in place of what the libraries raise."""
    from safetensors import SafetensorError

    from ..modeling import PACKAGED_MODELS

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        if not is_raised(error) and isinstance(error, ValueError):
            raise
        near = get_close_matches(name, PACKAGED_MODELS, n=1)
        fix = (
            f"did you mean {near[0]!r}?"
            if near and near[0] != name
            else "check the name, the files and the connection."
        )
        raise OSError(f"`{option}` is {name!r}, which cannot be loaded ({_first_sentence(error)}): {fix}") from error


def load_named(
    option: str, name: str, dtype: str, device: "torch.device | str | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model that an option names, on a device if one is given, and its tokenizer."""
    from ..modeling import load_model_and_tokenizer

    with named(option, name):
        model, tokenizer = load_model_and_tokenizer(name, dtype=dtype)
    return (model if device is None else model.to(device)), tokenizer


def put_adapter(model: "PreTrainedModel", name: str) -> "PeftModel":
    """The model with the adapter that `adapter` names."""
    from peft import PeftModel

    with named("adapter", name):
        return PeftModel.from_pretrained(model, name)


def _first_sentence(error: Exception) -> str:
    """Libraries follow it up with advice on their own arguments."""
    lines = str(error).strip().splitlines()
    return one_line(type(error)(lines[0])).rstrip(".:") if lines else type(error).__name__
