"""The console script `elm`: find the subcommand, run it, and say in one line what was used wrongly."""

import os
import sys
from difflib import get_close_matches
from importlib import import_module

from .. import __version__
from .errors import is_wrong_use, one_line


# By name: the module of this folder that is imported when it is run, the function there that takes its options, and what it does.
COMMANDS = {
    "erase": ("erase.main", "erase concepts with a LoRA adapter, and measure before and after"),
    "doctor": ("doctor.main", "say what `erase` would do, take and stumble over, before anything heavy runs"),
    "evaluate": ("evaluate.main", "measure an adapter or a checkpoint beside its reference"),
    "attack": ("attack.main", "try to bring the knowledge back"),
    "compare": ("compare.main", "compare all methods on the same data"),
    "publish": ("adapters.publish", "publish an adapter with its report and card"),
    "chat": ("chat.main", "ask reference and erased model side by side, on a page or in the terminal"),
    "export": ("adapters.export", "write an adapter for llama.cpp, or merged into full weights"),
    "shrink": ("adapters.shrink", "write the nearest adapter of a smaller rank, as servers take it"),
    "synthesize": ("synthesize.main", "write fluent completions, for the consistency term"),
    "leaderboard": ("adapters.leaderboard", "published adapters side by side"),
    "recipes": ("recipes.main", "list the recipes that ship with the package, or print one"),
}


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
        sys.stdout.write(f"elm-trainer {__version__}\n")
        return
    name, *options = words
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        fix = f"did you mean `elm {near[0]}`?" if near else f"use one of {', '.join(COMMANDS)}."
        _fail("elm", f"there is no subcommand {name!r}: {fix}")
    try:
        module, _, function = COMMANDS[name][0].partition(".")
        getattr(import_module(f"{__package__}.{module}"), function)(options)
    except Exception as error:
        if with_traceback or not is_wrong_use(error):
            raise
        _fail(f"elm {name}", one_line(error))


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


def _fail(program: str, message: str) -> None:
    sys.stderr.write(f"{program}: error: {message}\n")
    sys.exit(2)
