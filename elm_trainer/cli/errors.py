"""Tell a wrong use from a bug and say it in one line; of models and adapters, with the name of the option."""

import dis
import re
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import NoReturn

import elm_trainer


_PACKAGE = Path(elm_trainer.__file__).parent
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Errors of the Hub, and of a folder that another run holds, are of type RuntimeError.
_TOLD = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)


def end_with(parser: ArgumentParser, message: str) -> NoReturn:
    """Answer a wrong use in one line, without the usage."""
    # An option has two spellings, with underscores and with hyphens; one is told.
    message = re.sub(r"(--\w+)/--[\w-]+", r"\1", " ".join(message.split()))
    parser.exit(2, f"{parser.prog}: error: {message}\n")


class OneLineParser(ArgumentParser):
    """A parser whose answer to a wrong use is that of [`end_with`]."""

    def error(self, message: str) -> NoReturn:
        end_with(self, message)


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


def check_folder(folder: Path) -> None:
    """Raise `ValueError` where a folder holds an earlier run."""
    found = [name for name in ("adapter", "data", "making") if (folder / name).exists()]
    found += sorted(path.name for path in folder.glob("checkpoint-*"))
    if found:
        what = "a finished run" if "adapter" in found else "a run that was stopped"
        raise ValueError(
            f"`output_dir` is {str(folder)!r}, which holds {what} ({', '.join(found)}): `--resume` goes on with it, "
            "`--overwrite` removes it, or name another folder."
        )


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


def _first_sentence(error: Exception) -> str:
    """Libraries follow it up with advice on their own arguments."""
    lines = str(error).strip().splitlines()
    return one_line(type(error)(lines[0])).rstrip(".:") if lines else type(error).__name__
