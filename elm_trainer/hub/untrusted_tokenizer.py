"""A tokenizer that a stranger made: tried on a few words, and its chat template where it can neither hang nor fill memory."""

import json
import subprocess
import sys

from transformers import PreTrainedTokenizerBase

from .errors import UnsafeAdapterError


_TEXT = "The capital of Peru is Lima, 42 km² away.\n\n  Isn't it? 東京 🙂" + " a" * 40
_SECONDS, _BYTES, _MOST_CHARACTERS = 2, 1 << 30, 200_000
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
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer that was loaded.
        whose (`str`): Adapter or base that it belongs to, for the error.

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
            input=json.dumps([template, _SECONDS, _BYTES]),
            capture_output=True,
            text=True,
            timeout=10 * _SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "does not come to an end"
    if done.returncode < 0:
        return f"takes more than {_SECONDS} s for a chat of a few words"
    if done.returncode > 0:
        return f"takes more than {_BYTES >> 30} GiB for a chat of a few words"
    if int(done.stdout) > _MOST_CHARACTERS:
        return f"writes {int(done.stdout)} characters for a chat of a few words"
    return None
