"""Tell a wrong use from a bug, by how an error came about, and say it in one line."""

import dis
import re
from argparse import ArgumentParser
from pathlib import Path
from types import FrameType
from typing import NoReturn

import elm_trainer


_PACKAGE = Path(elm_trainer.__file__).parent
# Errors of the Hub, and of a folder that another run holds, are of type RuntimeError.
_TOLD = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)


class OneLineParser(ArgumentParser):
    """A parser that answers a wrong use in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, error_line(self.prog, message))


def error_line(program: str, message: str) -> str:
    """What a parser says of a wrong use. An option has two spellings, with underscores and with hyphens; one is told."""
    message = re.sub(r"(--\w+)/--[\w-]+", r"\1", " ".join(message.split()))
    return f"{program}: error: {message}\n"


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
