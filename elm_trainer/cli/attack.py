"""Attack an erased model: `elm attack --adapter outputs/demo/adapter --output_dir outputs/demo`.

A merged model or any other checkpoint is attacked beside the model it was erased from:
`elm attack --model cais/Zephyr_RMU --reference HuggingFaceH4/zephyr-7b-beta`.
Writes `attacks.json`, `attacks.png` and `attacks.md` into `output_dir`; an interrupted run continues where it stopped.
With `--gold_standard FOLDER` a small model that was never taught an invented concept shows there what relearning from
nothing looks like; its models are trained once.
"""

from dataclasses import dataclass, field
from pathlib import Path

from .options import CommandLine, check_adapter, check_dtype, load_named, put_adapter
from .recipes import shipped


@dataclass
class AttackArguments:
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of an adapter."})
    model: str = field(
        default="smollm2-135m-instruct", metadata={"help": "The adapter's base, or an erased checkpoint."}
    )
    reference: str | None = field(default=None, metadata={"help": "What an erased checkpoint was erased from."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    device: str = field(default="cpu", metadata={"help": "Where the models run, e.g. cuda."})
    concept: str = field(default="capitals", metadata={"help": "What was erased."})
    bank: str | None = field(default=None, metadata={"help": "Question bank of your own concept."})
    forget: str | None = field(default=None, metadata={"help": "Texts about it, to relearn it from."})
    questions: int = field(default=60, metadata={"help": "Questions asked under every attack."})
    attacks: list[str] | None = field(default=None, metadata={"help": "Names of attacks; all by default."})
    ladder: str | None = field(default=None, metadata={"help": "YAML list of attacks, as in recipes/attacks."})
    gold_standard: str | None = field(default=None, metadata={"help": "Folder of the never-taught model, if wanted."})
    output_dir: str = field(default="outputs/attacks", metadata={"help": "Where the report goes."})


def main(argv: list[str] | None = None) -> None:
    line = CommandLine("attack", __doc__, argv, own=AttackArguments)
    [arguments] = line.early()
    if (arguments.adapter is None) == (arguments.reference is None):
        line.fail("give either --adapter, or --model with its --reference")
    if arguments.attacks and arguments.ladder:
        line.fail("give either --attacks or --ladder")
    from . import hush_libraries

    hush_libraries()
    # After the options are read, so that neither --help nor a wrong one need wait for torch.
    from rich.console import Console

    from .. import load_texts, read_questions
    from ..attacks import (
        attack_erasure,
        built_in_target,
        default_attacks,
        load_attacks,
        markdown_attacks,
        render_attacks,
    )
    from ..attacks.base import check_asked
    from ..attacks.report import plot_attacks
    from ..data.facts import FACTS
    from ..evaluation.pair import ModelPair
    from ..files import write_text
    from ..gold_standard import gold_standard, render_gold_standard
    from ..gold_standard.run import plot_gold_standard

    attacks = load_attacks(shipped(arguments.ladder)) if arguments.ladder else default_attacks(arguments.attacks)
    output = Path(arguments.output_dir)
    # Whatever can be wrong is found before a model is loaded.
    check_dtype(arguments.dtype)
    bank, forget = None, ()
    if arguments.bank:
        bank = read_questions(arguments.bank, "test")
        check_asked(bank)
        forget = load_texts(arguments.forget)["text"][:] if arguments.forget else ()
    elif arguments.concept not in FACTS:
        line.fail(f"there are no built-in questions about {arguments.concept!r}: give a --bank")
    if arguments.adapter is not None:
        check_adapter(arguments.adapter)

    model, tokenizer = load_named("model", arguments.model, arguments.dtype, arguments.device)
    if arguments.adapter is not None:
        pair = ModelPair(put_adapter(model, arguments.adapter))
    else:
        reference, _ = load_named("reference", arguments.reference, arguments.dtype, arguments.device)
        pair = ModelPair(model, reference)
    target = built_in_target(pair, tokenizer, arguments.concept, arguments.questions, bank=bank, forget=forget)
    report = attack_erasure(target, attacks, output_dir=output)

    plot_attacks(report, output / "attacks.png")
    write_text(output / "attacks.md", markdown_attacks(report))
    console = Console()
    console.print(render_attacks(report))
    for entry in report["skipped"]:
        console.print(f"Skipped {entry['name']}: {entry['reason']}.")
    console.print(
        f"{report['seconds']['total']:.0f} s, peak {report['peak_memory_bytes'] / 1e9:.1f} GB. "
        f"See attacks.json, attacks.md and attacks.png in {output}."
    )
    if arguments.gold_standard:
        gold = gold_standard(output_dir=arguments.gold_standard)
        plot_gold_standard(gold, Path(arguments.gold_standard) / "gold_standard.png")
        console.print(render_gold_standard(gold))
