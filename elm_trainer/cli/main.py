"""The console script `elm`: find the subcommand, run it, and say in one line what was used wrongly."""

import dis
import os
import re
import sys
from argparse import ArgumentParser
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

import elm_trainer


# By name: the module of this folder that is imported when it is run, the function there that takes its options, and what it does.
COMMANDS = {
    "erase": ("erase.main", "erase concepts with a LoRA adapter, and measure before and after"),
    "doctor": ("doctor.main", "say what `erase` would do, take and stumble over, before anything heavy runs"),
    "evaluate": ("measure.evaluate", "measure an adapter or a checkpoint beside its reference"),
    "attack": ("measure.attack", "try to bring the knowledge back"),
    "compare": ("measure.compare", "compare all methods on the same data"),
    "publish": ("adapters.publish", "publish an adapter with its report and card"),
    "chat": ("chat.main", "ask reference and erased model side by side, on a page or in the terminal"),
    "export": ("adapters.export", "write an adapter for llama.cpp, or merged into full weights"),
    "shrink": ("adapters.shrink", "write the nearest adapter of a smaller rank, as servers take it"),
    "synthesize": ("synthesize.main", "write fluent completions, for the consistency term"),
    "leaderboard": ("adapters.leaderboard", "published adapters side by side"),
    "recipes": ("recipes.main", "list the recipes that ship with the package, or print one"),
}
_PACKAGE = Path(elm_trainer.__file__).parent
# Errors of the Hub, and of a folder that another run holds, are of type RuntimeError.
_TOLD = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)


def main(argv: list[str] | None = None) -> None:
    """Run `elm`.

    A wrong use (see [`is_wrong_use`]) ends in one line on stderr and the exit code 2; with `--traceback`, or where
    `ELM_TRACEBACK` is 1, its traceback is shown instead. Any other error keeps its traceback.

    Args:
        argv (`list[str]`, *optional*): Subcommand and options; those of the process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in words or os.environ.get("ELM_TRACEBACK") == "1"
    words = [word for word in words if word != "--traceback"]
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return
    if words[0] == "--version":
        sys.stdout.write(f"elm-trainer {elm_trainer.__version__}\n")
        return
    name, *options = words
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        fix = f"did you mean `elm {near[0]}`?" if near else f"use one of {', '.join(COMMANDS)}."
        OneLineParser("elm").error(f"there is no subcommand {name!r}: {fix}")
    try:
        module, _, function = COMMANDS[name][0].partition(".")
        getattr(import_module(f"{__package__}.{module}"), function)(options)
    except Exception as error:
        if with_traceback or not is_wrong_use(error):
            raise
        OneLineParser(f"elm {name}").error(one_line(error))


def _overview() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: elm SUBCOMMAND [--config FILE | --recipe NAME] [--OPTION VALUE ...]",
            "",
            "Erase a concept from a causal language model, and measure how well.",
            "",
            *(f"  {name:{width}}  {about}" for name, (_, about) in COMMANDS.items()),
            "",
            "`elm SUBCOMMAND --help` shows the options. --traceback shows where an error was raised, --version the version.",
            "",
        ]
    )


class OneLineParser(ArgumentParser):
    """A parser that answers a wrong use in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        # An option has two spellings, with underscores and with hyphens; one is told.
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", " ".join(message.split()))
        self.exit(2, f"{self.prog}: error: {message}\n")


def is_wrong_use(error: Exception) -> bool:
    """Whether an error is the answer to a wrong use: one of our checks raised it, or the operating system refused a file.

    Our checks raise by a `raise` statement in the package. What merely goes wrong in an operation, as a `TypeError` of
    `None + 1`, is a bug, and so is what a library raises about arguments that the package gave it.
    """
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return True
    frame, raised = _origin(error)
    ours = frame is not None and Path(frame.f_code.co_filename).is_relative_to(_PACKAGE)
    return raised and ours and isinstance(error, _TOLD)


def is_raised(error: Exception) -> bool:
    """Whether a `raise` statement made the error, in whichever library, rather than an operation that went wrong."""
    return _origin(error)[1]


def one_line(error: Exception) -> str:
    """The message of an error without line breaks, and without the number that the operating system puts first."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r} could not be used: {error.strerror}."
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _origin(error: Exception) -> tuple[FrameType | None, bool]:
    """The frame in which an error came about, and whether the instruction there was a `raise`."""
    entry = error.__traceback__
    if entry is None:
        return None, False
    while entry.tb_next is not None:
        entry = entry.tb_next
    code = entry.tb_frame.f_code.co_code
    return entry.tb_frame, code[entry.tb_lasti] == dis.opmap["RAISE_VARARGS"]
