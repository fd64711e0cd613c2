"""Measure an erasure beside its reference: `elm evaluate --adapter outputs/demo/adapter`.

Several adapters of one base are stacked and measured together. A full checkpoint is measured against the model it came from: `--model cais/Zephyr_RMU --reference HuggingFaceH4/zephyr-7b-beta`.
`--benchmark tofu:forget10` and `--harness wmdp_bio` ask these in place of questions about `--concepts` where none are named.
An interrupted evaluation continues where it stopped. Under `accelerate launch` and `torchrun` the processes share the work.
"""

from dataclasses import asdict, dataclass, field
from importlib.util import find_spec

from .options import CommandLine, check_adapter, check_dtype, load_named, put_adapter


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


def main(argv: list[str] | None = None) -> None:
    command = CommandLine("evaluate", __doc__, argv, own=EvaluationArguments)
    [arguments] = command.early()
    for adapter in arguments.adapter:
        check_adapter(adapter)
    if arguments.generator == "vllm" and find_spec("vllm") is None:
        command.fail("--generator is 'vllm', which is not installed: `pip install vllm`, or use transformers.")
    if arguments.generator not in ("transformers", "vllm"):
        command.fail(f"--generator is {arguments.generator!r}: use transformers or vllm.")
    if arguments.generator == "vllm" and (len(arguments.adapter) != 1 or arguments.reference):
        command.fail("--generator is 'vllm', which needs one --adapter on --model: give it, or use transformers.")
    from . import hush_libraries

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
    where = {"dtype": arguments.dtype, "device": state.device}
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
