"""Models and adapters that an option names: what can be known is said at once, and the rest with the option's name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from .errors import is_raised, one_line


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    """Name the option whose model, or adapter, the block cannot load.

    Raises:
        OSError: in place of what the libraries raise about a model that they do not find or cannot read.
    """
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
