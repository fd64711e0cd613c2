"""Measure what is left of the knowledge, under attacks too, and what each method leaves: `elm evaluate`, `elm attack`, `elm compare`."""

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..comparison import ComparisonSettings
from . import hush_libraries
from .options import CommandLine, check_adapter, check_dtype, load_named, put_adapter
from .recipes import shipped


@dataclass
class AskedArguments:
    """Of every subcommand that measures an adapter: the base, and what is asked."""

    model: str = field(
        default="smollm2-135m-instruct", metadata={"help": "Base of the adapter, or erased checkpoint."}
    )
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    concepts: list[str] = field(default_factory=lambda: ["capitals"], metadata={"help": "What was erased."})
    bank: list[str] | None = field(
        default=None, metadata={"help": "Question bank of each concept; none for the built-in one."}
    )
    questions: int = field(default=120, metadata={"help": "Questions per bank."})
    measures: list[str] | None = field(default=None, metadata={"help": "What is measured; everything by default."})


@dataclass
class EvaluationArguments(AskedArguments):
    adapter: list[str] = field(default_factory=list, metadata={"help": "Folder or Hub id; several are stacked."})
    reference: str | None = field(default=None, metadata={"help": "Model that an erased checkpoint came from."})
    split: str = field(
        default="test",
        metadata={"help": "Questions to ask: test, or dev to choose settings by.", "choices": ["test", "dev"]},
    )
    judges: list[str] = field(default_factory=list, metadata={"help": "Further judges of fluency."})
    benchmark: list[str] = field(
        default_factory=list,
        metadata={"help": "tofu:forget10, muse:news, rwku; `,from=FOLDER` behind it for local files."},
    )
    retain_report: str | None = field(
        default=None, metadata={"help": "report.json of a model without TOFU's forget set, for forget quality."}
    )
    harness: list[str] = field(
        default_factory=list, metadata={"help": "Tasks of lm-evaluation-harness, such as wmdp_bio wmdp_cyber mmlu."}
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples before each of their questions; the task's own number by default."}
    )
    limit: int | None = field(default=None, metadata={"help": "Questions of each such set or task; all by default."})
    generator: str = field(
        default="transformers", metadata={"help": "Who writes free answers: transformers, or vllm with an adapter."}
    )
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Where the report goes."})


def evaluate(argv: list[str] | None = None) -> None:
    """Measure an erasure beside its reference: `elm evaluate --adapter outputs/demo/adapter`.

    Several adapters of one base are stacked and measured together. A full checkpoint is measured against the model it came from: `--model cais/Zephyr_RMU --reference HuggingFaceH4/zephyr-7b-beta`.
    `--benchmark tofu:forget10` and `--harness wmdp_bio` ask these in place of questions about `--concepts` where none are named.
    An interrupted evaluation continues where it stopped. Under `accelerate launch` and `torchrun` the processes share the work.
    """
    command = CommandLine("evaluate", evaluate.__doc__, argv, own=EvaluationArguments)
    [arguments] = command.early()
    for adapter in arguments.adapter:
        check_adapter(adapter)
    if arguments.generator == "vllm" and find_spec("vllm") is None:
        command.fail("--generator is 'vllm', which is not installed: `pip install vllm`, or use transformers.")
    if arguments.generator not in ("transformers", "vllm"):
        command.fail(f"--generator is {arguments.generator!r}: use transformers or vllm.")
    if arguments.generator == "vllm" and (len(arguments.adapter) != 1 or arguments.reference):
        command.fail("--generator is 'vllm', which needs one --adapter on --model: give it, or use transformers.")
    hush_libraries()
    # After the options are read, so that neither --help nor a wrong one need wait for torch.
    import torch
    from accelerate import PartialState

    from .. import evaluate_erasure, stack_erasures
    from ..evaluation.benchmarks import task_manager
    from ..evaluation.evaluate import write_evaluation
    from ..evaluation.fluency import VllmGenerator
    from ..evaluation.measures import measurable
    from ..evaluation.report import read_report, retained_ratios
    from ..evaluation.suite import benchmark_suite, suite_from_files

    # Whatever can be wrong is found before a model is loaded.
    check_dtype(arguments.dtype)
    suite = None
    if not (arguments.benchmark or arguments.harness) or command.given & {"concepts", "bank"}:
        suite = suite_from_files(arguments.concepts, arguments.bank, arguments.questions, arguments.split)
    suite = benchmark_suite(arguments.benchmark, limit=arguments.limit, suite=suite)
    suite.harness, suite.num_fewshot, suite.limit = arguments.harness, arguments.num_fewshot, arguments.limit
    suite.check()
    if suite.harness:
        task_manager(suite.harness)
    if arguments.retain_report is not None:
        suite.retained = retained_ratios(read_report(arguments.retain_report), suite)
    measures = measurable(arguments.measures, suite)
    # Without the hint Accelerate takes several processes on CPUs for one.
    state = PartialState(cpu=not torch.accelerator.is_available())
    where: dict[str, Any] = {"dtype": arguments.dtype, "device": state.device}
    model, tokenizer = load_named("model", arguments.model, **where)
    if len(arguments.adapter) > 1:
        adapters = {f"erasure-{number}": adapter for number, adapter in enumerate(arguments.adapter, 1)}
        model, tokenizer = stack_erasures(adapters, base_model=model)
    elif arguments.adapter:
        model = put_adapter(model, arguments.adapter[0])
    reference = load_named("reference", arguments.reference, **where)[0] if arguments.reference else None
    generator = None
    if arguments.generator == "vllm":
        generator = VllmGenerator(arguments.model, arguments.adapter[0], dtype=arguments.dtype)
    report = evaluate_erasure(
        model,
        reference,
        suite,
        tokenizer,
        measures=measures,
        judges={name: load_named("judges", name, **where) for name in arguments.judges},
        output_dir=arguments.output_dir,
        details={"recipe": asdict(arguments)},
        generator=generator,
    )
    if state.is_main_process:
        write_evaluation(arguments.output_dir, report)
    # A launched process that ends within its group may be aborted by the threads of its backend.
    state.destroy_process_group()


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


def attack(argv: list[str] | None = None) -> None:
    """Attack an erased model: `elm attack --adapter outputs/demo/adapter --output_dir outputs/demo`.

    A merged model or any other checkpoint is attacked beside the model it was erased from:
    `elm attack --model cais/Zephyr_RMU --reference HuggingFaceH4/zephyr-7b-beta`.
    Writes `attacks.json`, `attacks.png` and `attacks.md` into `output_dir`; an interrupted run continues where it stopped.
    With `--gold_standard FOLDER` a small model that was never taught an invented concept shows there what relearning from
    nothing looks like; its models are trained once.
    """
    line = CommandLine("attack", attack.__doc__, argv, own=AttackArguments)
    [arguments] = line.early()
    if (arguments.adapter is None) == (arguments.reference is None):
        line.fail("give either --adapter, or --model with its --reference")
    if arguments.attacks and arguments.ladder:
        line.fail("give either --attacks or --ladder")
    hush_libraries()
    # After the options are read, so that neither --help nor a wrong one need wait for torch.
    from rich.console import Console

    from .. import load_texts, read_questions
    from ..attacks import attack_erasure, built_in_target, default_attacks, load_attacks
    from ..attacks.base import check_asked
    from ..attacks.report import markdown_attacks, plot_attacks, render_attacks
    from ..data.facts import FACTS
    from ..evaluation.pair import ModelPair
    from ..files import write_text
    from ..gold_standard import gold_standard, plot_gold_standard, render_gold_standard

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


def compare(argv: list[str] | None = None) -> None:
    """Compare all methods on the same data: `elm compare --config recipes/compare-smollm2-135m.yaml`.

    Writes `report.json`, `report.md` and `pareto.png` into `output_dir`; a stopped comparison continues where it stopped.
    """
    line = CommandLine(
        "compare",
        compare.__doc__,
        argv,
        config="elm_trainer.comparison.config.ComparisonConfig",
        common=ComparisonSettings,
    )
    # A value of the wrong type is found without torch, which takes seconds to load.
    line.early()
    hush_libraries()
    from rich.console import Console

    from ..comparison.run import compare_methods
    from ..comparison.tables import markdown_comparison, plot_comparison, render_comparison
    from ..files import write_text

    [config] = line.complete()
    report = compare_methods(config)
    output = Path(config.output_dir)
    write_text(output / "report.md", markdown_comparison(report))
    plot_comparison(report, output / "pareto.png")
    console = Console()
    for table in render_comparison(report):
        console.print(table)
    console.print(
        f"{sum(report['seconds'].values()):.0f} s, peak {report['peak_memory_bytes'] / 1e9:.1f} GB. "
        f"See {output}: report.md, report.json and pareto.png."
    )
