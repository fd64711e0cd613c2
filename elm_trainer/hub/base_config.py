"""`config.json` of a base that a stranger made: what would fetch code from the Hub, or never be done, is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file

from ..modeling import PACKAGED_MODELS
from .errors import UnsafeAdapterError, UploadError
from .failures import named_errors
from .fetch import Access, check_sizes, describe
from .module_pattern import is_plain_name, matching_steps
from .untrusted_json import read_json, short


# Parts that are built one by one; the deepest models have two hundred layers, the broadest five hundred experts.
_BUILT = re.compile(r"(layers?|depth|blocks|experts)$")
_MOST_BUILT = 2_000
# transformers compares names of modules with them, as regular expressions.
_PATTERNS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers", "targets")
_MOST_STEPS = 100_000


def check_base_config(name: str, revision: str | None, access: Access) -> None:
    """Check what a base says of itself, before transformers reads it.

    Args:
        name (`str`): Hub id or folder; a model that packages ship and a GGUF file pass.
        revision (`str`, *optional*): Commit, tag or branch of the repository.
        access ([`Access`]): How to reach the Hub.

    Raises:
        UnsafeAdapterError: if it is itself an adapter, asks for a kernel from the Hub, would take for ever to build, or a
            file is far too large.
        HubError: if the Hub does not give it.
    """
    if name in PACKAGED_MODELS or name.endswith(".gguf"):
        return
    offline = access.local_files_only or constants.HF_HUB_OFFLINE
    if not (offline or Path(name).is_dir()):
        try:
            with named_errors(name, f"Loading the base model {name}"):
                check_sizes(describe(name, revision, access).siblings or (), f"The base model {name}")
        except UploadError:
            pass  # It may lie in the cache whole; if not, transformers says so.
    options: dict[str, Any] = dict(
        revision=revision, token=access.token, cache_dir=access.cache_dir, local_files_only=offline
    )
    # transformers would load an adapter that is named as a base on a further base, and check none of it.
    if find_adapter_config_file(name, **options) is not None:
        raise UnsafeAdapterError(f"The base model {name} is itself an adapter: name the model that it belongs to.")
    path = cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **options)
    if path is not None:
        _check_config(read_json(Path(path)), f"The base model {name}")


def _check_config(config: Any, base: str) -> None:
    for key, value in _settings(config):
        if "implementation" in key and any("/" in text for text in _texts(value)):
            raise UnsafeAdapterError(
                f"{base}: `{key}` is {short(value)}, a kernel on the Hub, whose code would run here: pass another base as "
                "`base_model`."
            )
        if _BUILT.search(key) and type(value) is int and value > _MOST_BUILT:
            raise UnsafeAdapterError(
                f"{base}: `{key}` is {short(value)}, more than {_MOST_BUILT}: it would never be built. Pass another base "
                "as `base_model`."
            )
        if key in _PATTERNS:
            for text in _texts(value):
                _check_pattern(key, text, base)


def _check_pattern(key: str, text: str, base: str) -> None:
    pattern = text.removeprefix("re:")
    try:
        if not is_plain_name(pattern) and matching_steps(pattern, before=1) > _MOST_STEPS:
            raise ValueError("too many parts of it take any text")
    except ValueError as error:
        raise UnsafeAdapterError(
            f"{base}: `{key}` holds {short(text)}, a pattern that might take for ever to match, as {error}: pass another "
            "base as `base_model`."
        ) from error


def _settings(content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield key, value
            yield from _settings(value)
    elif isinstance(content, list):
        for value in content:
            yield from _settings(value)


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _texts(value)
