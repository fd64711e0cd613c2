"""Ask the reference and an erased model side by side: `elm chat --adapter outputs/demo/adapter`.

The page (`pip install "elm-trainer[chat]"`) shows both answers token by token with the concept's probability, attacks as
buttons, and the adapter's report. In the terminal (`--terminal`, or without the extra) each line of stdin is a question;
`/help` lists what else can be typed.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..checks import check_numbers
from . import hush_libraries
from .options import CommandLine, check_adapter, check_dtype


if TYPE_CHECKING:
    from rich.console import Console

    from ..chat import Answer, ChatConcept, ErasureChat

HELP = """/attacks         list the attacks
/NAME [QUESTION] ask QUESTION, or the last one again, as the attack NAME does
/adapter [NAME]  list the adapters, or take another
/quit            end, as the end of the input does"""


@dataclass
class ChatArguments:
    adapter: list[str] = field(metadata={"help": "Folders or Hub ids of adapters of one base, to choose from."})
    model: str | None = field(default=None, metadata={"help": "Their base; by default the one that the first names."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    device: str = field(default="cpu", metadata={"help": "Where the model runs, e.g. cuda."})
    concept: str = field(default="capitals", metadata={"help": "What was erased."})
    bank: str | None = field(default=None, metadata={"help": "Question bank of your own concept."})
    temperature: float = field(default=0.0, metadata={"help": "Of sampling; 0 is greedy."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    seed: int = field(default=0, metadata={"help": "Of sampling."})
    allow_mismatch: bool = field(default=False, metadata={"help": "Go on where the base is another one."})
    terminal: bool = field(default=False, metadata={"help": "Read questions from stdin instead."})
    port: int | None = field(default=None, metadata={"help": "Port of the page; the first free one from 7860."})

    def __post_init__(self):
        check_numbers(self, (("at least 1", ("max_new_tokens",)), ("at least 0", ("temperature",))))
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError(f"`port` is {self.port}: give one from 1 to 65535, or leave it out.")
        if twice := sorted({name for name in self.adapter if self.adapter.count(name) > 1}):
            raise ValueError(f"`adapter` names {twice[0]!r} twice: leave one out.")


def main(argv: list[str] | None = None) -> None:
    line = CommandLine("chat", __doc__, argv, own=ChatArguments)
    [arguments] = line.early()
    for adapter in arguments.adapter:
        check_adapter(adapter)
    in_terminal = arguments.terminal
    if not in_terminal and find_spec("gradio") is None:
        sys.stderr.write('The page needs `pip install "elm-trainer[chat]"`: asking in the terminal.\n')
        in_terminal = True
    hush_libraries()
    # After the options are read, so that neither --help nor a wrong one need wait for torch.
    from ..chat import ErasureChat, load_chat_concept
    from ..hub.adapter import Access, find_adapter
    from ..hub.load import load_found

    # Whatever can be wrong is found before a model is loaded.
    check_dtype(arguments.dtype)
    concept = load_chat_concept(arguments.concept, arguments.bank)
    access = Access()
    names = {name: f"erasure-{number}" for number, name in enumerate(arguments.adapter, 1)}
    found = {inner: find_adapter(name, None, access) for name, inner in names.items()}
    model, tokenizer = load_found(
        found, arguments.model, access, allow_mismatch=arguments.allow_mismatch, dtype=arguments.dtype
    )
    chat = ErasureChat(model.to(arguments.device), tokenizer, names)
    if in_terminal:
        from rich.console import Console

        ask_in_terminal(chat, concept, arguments, sys.stdin, Console(highlight=False, markup=False))
        return
    from ..chat_page import make_page, serve

    folders = {name: found[inner].folder for name, inner in names.items()}
    page = make_page(
        chat,
        concept,
        folders,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
    )
    address = serve(page, arguments.port)
    sys.stdout.write(f"Chat at {address} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    page.block_thread()


def ask_in_terminal(
    chat: "ErasureChat", concept: "ChatConcept", arguments: ChatArguments, lines: Iterable[str], console: "Console"
) -> None:
    """Answer each line, side by side; in a pipe one below the other. A wrong line is told and the next one read."""
    from ..chat import DEFINITION, PLAIN

    adapter, last = arguments.adapter[0], ""
    if console.is_terminal:
        console.print(f"{DEFINITION}\nType a question, or /help.", style="dim")
        console.print("> ", end="")
    for line in lines:
        text, attack = line.strip(), PLAIN
        try:
            if text.startswith("/"):
                word, _, rest = text[1:].partition(" ")
                if word == "quit":
                    return
                if word in ("help", "attacks", "adapter"):
                    adapter = _command(word, rest.strip(), chat, concept, adapter, console)
                    continue
                attack, text = word, rest.strip() or last
                if attack not in (known := concept.attack_names(chat.processing_class)):
                    raise ValueError(
                        f"there is no attack or command {attack!r}: use /help, or one of {', '.join(known)}."
                    )
                if not text:
                    raise ValueError(f"{attack} has no question to ask: write one behind it.")
            if not text:
                continue
            last = text
            answers = chat.answer(
                concept.prompt(text, attack, chat.processing_class),
                concept.terms(text),
                adapter=adapter,
                max_new_tokens=arguments.max_new_tokens,
                temperature=arguments.temperature,
                seed=arguments.seed,
            )
            _show(text if attack == PLAIN else f"{text} ({attack})", answers, console)
        except ValueError as error:
            console.print(f"Not asked: {error}", style="red")
        finally:
            if console.is_terminal:
                console.print("> ", end="")


def _command(
    word: str, rest: str, chat: "ErasureChat", concept: "ChatConcept", adapter: str, console: "Console"
) -> str:
    """Carry out a command; the adapter that is asked from here on."""
    if word == "help":
        console.print(HELP)
    elif word == "attacks":
        console.print("\n".join(concept.attack_names(chat.processing_class)))
    elif not rest:
        console.print("\n".join(f"{'*' if name == adapter else ' '} {name}" for name in chat.adapters))
    elif rest not in chat.adapters:
        raise ValueError(f"there is no adapter {rest!r}: use one of {', '.join(chat.adapters)}.")
    else:
        adapter = rest
    return adapter


def _show(asked: str, answers: Any, console: "Console") -> None:
    from rich.live import Live

    from ..chat import percent

    if console.is_terminal:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            for state in answers:
                live.update(_columns(state, console.width), refresh=True)
        return
    [*_, state] = answers
    # Words of an answer are not to be broken where a pipe is thought to end.
    console.print(f"question: {asked}", soft_wrap=True)
    for side, answer in state.items():
        console.print(f"{side}: {' '.join(answer.text.split())}", soft_wrap=True)
        shares = " ".join(percent(token.concept) for token in answer.tokens)
        console.print(
            f"{side}, concept in % at each token: {shares} (highest {percent(answer.highest)}, {answer.state})",
            soft_wrap=True,
        )
    console.print()


def _columns(state: "dict[Any, Answer]", width: int) -> Any:
    """Both answers in two columns, the color of a token by the concept's probability."""
    from rich.table import Table
    from rich.text import Text

    from ..chat import percent

    table = Table(box=None, padding=(0, 2, 0, 0), width=width)
    cells = []
    for side, answer in state.items():
        table.add_column(f"{side} (highest {percent(answer.highest)} %)", ratio=1, overflow="fold")
        text = Text()
        for token in answer.tokens:
            concept = token.concept or 0.0
            style = "bold red" if concept >= 0.5 else "red" if concept >= 0.1 else "yellow" if concept >= 0.01 else ""
            text.append(token.text, style)
            if concept >= 0.01:
                text.append(f"[{percent(concept)}]", "dim")
        cells.append(text)
    table.add_row(*cells)
    return table
