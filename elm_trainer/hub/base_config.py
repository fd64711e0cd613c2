"""A stranger's base model: its config, tokenizer and chat template, checked before transformers acts on them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, cached_file, find_adapter_config_file

from ..modeling import PACKAGED_MODELS
from .adapter import Access, check_sizes, describe
from .adapter_config import is_plain_name, matching_steps
from .errors import UnsafeAdapterError, UploadError, named_errors
from .untrusted import (
    MOST_BASE_STEPS,
    MOST_PARTS,
    TEMPLATE_BYTES,
    TEMPLATE_CHARACTERS,
    TEMPLATE_SECONDS,
    read_json,
    short,
    walk,
)


# Parts that are built one by one.
_BUILT = re.compile(r"(layers?|depth|blocks|experts)$")
# transformers compares names of modules with them, as regular expressions.
_PATTERNS = ("modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers", "targets")


def check_base_config(name: str, revision: str | None, access: Access) -> None:
    """Check what a base says of itself, before transformers reads it.

    Args:
        name: Hub id or folder; a model that packages ship and a GGUF file pass.
        revision: Commit, tag or branch of the repository.
        access: How to reach the Hub.

    Raises:
        UnsafeAdapterError: if it is itself an adapter, asks for a kernel from the Hub, would take for ever to build,
            or a file is far too large.
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
    for key, value, _ in walk(config):
        if "implementation" in key and any("/" in text for text in _texts(value)):
            raise UnsafeAdapterError(
                f"{base}: `{key}` is {short(value)}, a kernel on the Hub, whose code would run here: pass another base as "
                "`base_model`."
            )
        if _BUILT.search(key) and type(value) is int and value > MOST_PARTS:
            raise UnsafeAdapterError(
                f"{base}: `{key}` is {short(value)}, more than {MOST_PARTS}: it would never be built. Pass another base as "
                "`base_model`."
            )
        for text in _texts(value) if key in _PATTERNS else ():
            pattern = text.removeprefix("re:")
            try:
                if not is_plain_name(pattern) and matching_steps(pattern, before=1) > MOST_BASE_STEPS:
                    raise ValueError("too many parts of it take any text")
            except ValueError as error:
                raise UnsafeAdapterError(
                    f"{base}: `{key}` holds {short(text)}, a pattern that might take for ever to match, as {error}: pass "
                    "another base as `base_model`."
                ) from error


def _texts(content: Any) -> list[str]:
    return [value for _, value, _ in walk(content) if isinstance(value, str)]


_TEXT = "The capital of Peru is Lima, 42 km² away.\n\n  Isn't it? 東京 🙂" + " a" * 40
# Jinja has no `while`, but loops in loops, and `9**9**9` is worked out when a template is compiled. Both happen in C or
# without end, where nothing in the same process can stop them. What transformers adds to Jinja is added here too.
_RENDER = """
import json, sys
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
template, seconds, size = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
except ImportError:  # Windows
    pass

class Generation(Extension):
    tags = {"generation"}
    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)
    def _body(self, caller):
        return caller()

def refuse(message):
    raise ValueError(message)

environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
environment.globals.update(raise_exception=refuse, strftime_now=lambda form: "1 January 2026")
user = {"role": "user", "content": "What is the capital of Peru?"}
chats = [[user], [user, {"role": "assistant", "content": "Lima."}, user], [{"role": "system", "content": "Be brief."}, user]]
longest = 0
for messages in chats:
    for begin in (True, False):
        try:
            told = environment.from_string(template).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=begin, bos_token="<s>", eos_token="</s>"
            )
        except MemoryError:
            raise
        except Exception:  # transformers will say what is wrong with it
            continue
        longest = max(longest, len(told))
print(longest)
"""


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Try a tokenizer on a short text, and its chat templates on short chats.

    Args:
        tokenizer: Tokenizer that was loaded.
        whose: Adapter or base that it belongs to, for the error.

    Raises:
        UnsafeAdapterError: if a template takes more than 2 s of the processor or 1 GiB, or writes more than 200,000
            characters.
        Exception: whatever tokenizers raises of broken rules.
    """
    tokenizer.decode(tokenizer(_TEXT)["input_ids"])
    templates = tokenizer.chat_template or ()
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if isinstance(template, str) and (fault := _fault(template)):
            raise UnsafeAdapterError(f"The chat template of {whose} {fault}: do not use it.")


def _fault(template: str) -> str | None:
    """What is wrong with a template, if anything."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _RENDER],
            input=json.dumps([template, TEMPLATE_SECONDS, TEMPLATE_BYTES]),
            capture_output=True,
            text=True,
            timeout=10 * TEMPLATE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "does not come to an end"
    if done.returncode < 0:
        return f"takes more than {TEMPLATE_SECONDS} s for a chat of a few words"
    if done.returncode > 0:
        return f"takes more than {TEMPLATE_BYTES >> 30} GiB for a chat of a few words"
    if int(done.stdout) > TEMPLATE_CHARACTERS:
        return f"writes {int(done.stdout)} characters for a chat of a few words"
    return None
