"""Write the adapter of a smaller rank that is nearest to an adapter: `elm shrink --adapter outputs/demo/adapter --rank 16`.

Servers load adapters up to a rank; vLLM's default is 16. With --evaluate both adapters are measured beside the base, as by
`elm evaluate`, and the cost is shown.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .measure import AskedArguments
from .options import CommandLine, check_adapter, check_dtype, named


if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation.suite import EvaluationSuite


@dataclass
class _Own:
    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    rank: int = field(default=16, metadata={"help": "Largest rank of the new adapter."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where it goes; beside the folder of the adapter, with its rank, by default."}
    )
    evaluate: bool = field(default=False, metadata={"help": "Measure the adapter and the new one."})


@dataclass
class ShrinkArguments(AskedArguments, _Own):
    """What is shrunk; the rest is for --evaluate."""


def main(argv: list[str] | None = None) -> None:
    [arguments] = CommandLine("shrink", __doc__, argv, own=ShrinkArguments).early()
    check_adapter(arguments.adapter)
    output = Path(arguments.output_dir or _beside(arguments.adapter, arguments.rank))
    from . import hush_libraries

    hush_libraries()
    from rich.console import Console

    from .. import shrink_adapter
    from ..evaluation.measures import measurable
    from ..evaluation.suite import suite_from_files

    suite = measures = None
    if arguments.evaluate:
        # Whatever can be wrong is found before anything is written.
        check_dtype(arguments.dtype)
        suite = suite_from_files(arguments.concepts, arguments.bank, arguments.questions)
        measures = measurable(arguments.measures, suite)
    shrunk = shrink_adapter(arguments.adapter, arguments.rank, output)
    worst = sorted(shrunk.modules.items(), key=lambda entry: entry[1])[:3]
    least = ", ".join(f"{name} ({share:.1%})" for name, share in worst)
    console = Console(highlight=False, markup=False)
    console.print(
        f"Rank {shrunk.rank_before} -> {shrunk.rank}: {shrunk.kept:.1%} of the squared norm of the updates is left; "
        f"least in {least}."
    )
    if suite is not None:
        console.print(_table(_evaluate(arguments, suite, measures, output)))
    console.print(f"See {output}.")


def _beside(adapter: str, rank: int) -> Path:
    """The folder of an adapter of the Hub is in the cache, where nothing is put."""
    path = Path(adapter)
    if path.is_dir():
        return path.parent / f"{path.resolve().name}-rank-{rank}"
    return Path("outputs") / f"{path.name}-rank-{rank}"


def _evaluate(
    arguments: ShrinkArguments, suite: "EvaluationSuite", measures: Any, output: Path
) -> dict[str, dict[str, Any]]:
    """Measure both adapters beside the base, whose answers are asked for once, and write their reports."""
    import torch
    from peft import PeftModel

    from .. import evaluate_erasure, load_model_and_tokenizer
    from ..evaluation.evaluate import write_evaluation

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with named("model", arguments.model):
        base, tokenizer = load_model_and_tokenizer(arguments.model, dtype=arguments.dtype)
    base = base.to(device)
    reports = {}
    for name, adapter in (("before", arguments.adapter), ("after", str(output))):
        folder = output.parent / f"{output.name}-evaluation" / name
        with named("adapter", adapter):
            model = PeftModel.from_pretrained(base, adapter)
        reports[name] = evaluate_erasure(
            model,
            None,
            suite,
            tokenizer,
            measures=measures,
            output_dir=folder,
            reference_dir=folder.parent,
            details={"recipe": asdict(arguments) | {"adapter": adapter}},
        )
        write_evaluation(folder, reports[name])
        base = model.unload()
    return reports


def _table(reports: Mapping[str, Mapping[str, Any]]) -> "Table":
    """The metrics that a reader looks at first, of the base and both adapters, and how the adapters differ item by item."""
    from .. import compare_reports
    from ..evaluation.tables import cell, metric_label, summary_metrics, terminal_table

    before, after = reports["before"], reports["after"]
    compared = compare_reports(before, after)
    table = terminal_table("What shrinking costs", "about", "measured by", "base", "before", "after", "change")
    for name in summary_metrics(before["figures"], before["roles"]):
        values = [before["figures"][name]["reference"], *(one["figures"][name]["erased"] for one in (before, after))]
        # Of all ways of asking together there is no list of items to be compared.
        changed = cell(compared[name]["change"]) if name in compared else ""
        table.add_row(*metric_label(name, before["roles"]), *(f"{one['value']:.3f}" for one in values), changed)
    return table
