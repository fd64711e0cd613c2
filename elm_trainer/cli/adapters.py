"""What is done with an adapter that is there: `elm export`, `elm shrink`, `elm publish`; and `elm leaderboard` of published ones.

The docstring of a subcommand's function is its help. What takes seconds to import, as torch does, is imported once the options
are read, so that neither --help nor a wrong one need wait for it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import hush_libraries
from .measure import AskedArguments
from .options import CommandLine, check_adapter, check_dtype, load_named, put_adapter


if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation.suite import EvaluationSuite


FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
# Those of `hub.leaderboard`, which takes seconds to import.
SORTS = ("innocence", "r_ppl", "fall", "perplexity", "worst_pmi", "worst_names_answer")


@dataclass
class ExportArguments:
    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    output: str = field(metadata={"help": "The .gguf file to write, or the folder for safetensors."})
    to: str = field(
        default="gguf-adapter",
        metadata={"help": "What is written.", "choices": ["gguf-adapter", "gguf", "safetensors"]},
    )
    type: str | None = field(
        default=None,
        metadata={
            "help": "Type of the weights: f32, f16, bf16 or q8_0; f32 for an adapter, else f16 or that of the base."
        },
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Base, where the adapter names none to be found here."}
    )
    base_file: str | None = field(
        default=None, metadata={"help": "For --to gguf: GGUF file of the base; the one trained on by default."}
    )


def export(argv: list[str] | None = None) -> None:
    """Write an erasure for llama.cpp and Ollama, or merged into full weights: `elm export --adapter outputs/demo/adapter --output capitals.gguf`.

    `--to gguf-adapter` writes the adapter alone, to be put on any GGUF of its base, however quantized; `--to gguf` the base's GGUF
    file with the adapter merged; `--to safetensors` a folder of full weights, as every other server reads it.
    """
    line = CommandLine("export", export.__doc__, argv, own=ExportArguments)
    [arguments] = line.early()
    check_adapter(arguments.adapter)
    if arguments.to != "safetensors" and not arguments.output.endswith(".gguf"):
        line.fail(f"`output` is {arguments.output!r}, but --to {arguments.to} writes a file: let it end in .gguf.")
    if arguments.base_file and arguments.to != "gguf":
        line.fail(f"`base_file` is {arguments.base_file!r}, but only --to gguf merges into a file: leave it out.")
    if arguments.to == "safetensors" and arguments.type and arguments.type not in FLOATS:
        line.fail(
            f"`type` is {arguments.type!r}, but safetensors are written as {', '.join(FLOATS)}: use one of these."
        )
    hush_libraries()
    from .. import export_gguf, export_gguf_adapter, load_erased, merge_erased

    dtype = {} if arguments.type is None else {"dtype": arguments.type}
    if arguments.to == "gguf-adapter":
        export_gguf_adapter(arguments.adapter, arguments.output, base_model=arguments.base_model, **dtype)
    elif arguments.to == "gguf":
        export_gguf(arguments.adapter, arguments.output, base_file=arguments.base_file, **dtype)
    else:
        wanted = FLOATS[arguments.type] if arguments.type else "auto"
        merge_erased(*load_erased(arguments.adapter, base_model=arguments.base_model, dtype=wanted), arguments.output)


@dataclass
class _Shrunk:
    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    rank: int = field(default=16, metadata={"help": "Largest rank of the new adapter."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where it goes; beside the folder of the adapter, with its rank, by default."}
    )
    evaluate: bool = field(default=False, metadata={"help": "Measure the adapter and the new one."})


@dataclass
class ShrinkArguments(AskedArguments, _Shrunk):
    """What is shrunk; the rest is for --evaluate."""


def shrink(argv: list[str] | None = None) -> None:
    """Write the adapter of a smaller rank that is nearest to an adapter: `elm shrink --adapter outputs/demo/adapter --rank 16`.

    Servers load adapters up to a rank; vLLM's default is 16. With --evaluate both adapters are measured beside the base, as by
    `elm evaluate`, and the cost is shown.
    """
    [arguments] = CommandLine("shrink", shrink.__doc__, argv, own=ShrinkArguments).early()
    check_adapter(arguments.adapter)
    adapter = Path(arguments.adapter)
    # The folder of an adapter of the Hub is in the cache, where nothing is put.
    place = adapter.parent if adapter.is_dir() else Path("outputs")
    output = Path(arguments.output_dir or place / f"{adapter.resolve().name}-rank-{arguments.rank}")
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
        console.print(_cost(*_evaluate(arguments, suite, measures, output)))
    console.print(f"See {output}.")


def _evaluate(
    arguments: ShrinkArguments, suite: "EvaluationSuite", measures: Any, output: Path
) -> list[dict[str, Any]]:
    """Measure both adapters beside the base, whose answers are asked for once, and write their reports."""
    import torch

    from .. import evaluate_erasure
    from ..evaluation.evaluate import write_evaluation

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    base, tokenizer = load_named("model", arguments.model, arguments.dtype, device)
    reports = []
    for name, adapter in (("before", arguments.adapter), ("after", str(output))):
        folder = output.parent / f"{output.name}-evaluation" / name
        model = put_adapter(base, adapter)
        report = evaluate_erasure(
            model,
            None,
            suite,
            tokenizer,
            measures=measures,
            output_dir=folder,
            reference_dir=folder.parent,
            details={"recipe": asdict(arguments) | {"adapter": adapter}},
        )
        write_evaluation(folder, report)
        reports.append(report)
        base = model.unload()
    return reports


def _cost(before: Mapping[str, Any], after: Mapping[str, Any]) -> "Table":
    """The metrics that a reader looks at first, of the base and both adapters, and how the adapters differ item by item."""
    from .. import compare_reports
    from ..evaluation.tables import cell, metric_label, summary_metrics, terminal_table

    compared = compare_reports(before, after)
    table = terminal_table("What shrinking costs", "about", "measured by", "base", "before", "after", "change")
    for name in summary_metrics(before["figures"], before["roles"]):
        values = [before["figures"][name]["reference"], *(one["figures"][name]["erased"] for one in (before, after))]
        # Of all ways of asking together there is no list of items to be compared.
        changed = cell(compared[name]["change"]) if name in compared else ""
        table.add_row(*metric_label(name, before["roles"]), *(f"{one['value']:.3f}" for one in values), changed)
    return table


@dataclass
class PublishArguments:
    adapter: str = field(metadata={"help": "Folder of the adapter."})
    repo_id: str = field(metadata={"help": "Name, or namespace/name, of the repository."})
    report: str | None = field(default=None, metadata={"help": "Report; report.json beside the adapter by default."})
    attacks: str | None = field(default=None, metadata={"help": "Attacks; attacks.json beside the adapter, if any."})
    bank: list[str] | None = field(default=None, metadata={"help": "Your own question banks that were asked."})
    model: str | None = field(default=None, metadata={"help": "The base on this machine; the recipe's by default."})
    base_model: str | None = field(default=None, metadata={"help": "Hub id of the base, if loaded from elsewhere."})
    base_revision: str | None = field(default=None, metadata={"help": "Its commit."})
    gguf_file: str | None = field(default=None, metadata={"help": "Its file, where the base is a GGUF file."})
    license: str | None = field(default=None, metadata={"help": "License; the base's by default."})
    private: bool | None = field(default=None, metadata={"help": "Whether it must be private; a new one is."})
    revision: str | None = field(default=None, metadata={"help": "Branch."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead."})
    tag: str | None = field(default=None, metadata={"help": "Tag of the commit."})
    allow: list[str] | None = field(default=None, metadata={"help": "Findings that may go up, as id=reason."})
    dry_run: bool = field(default=False, metadata={"help": "Send nothing; leave the folder in staging_dir."})
    staging_dir: str = field(default="outputs/published", metadata={"help": "Where the folder is staged."})


def publish(argv: list[str] | None = None) -> None:
    """Publish an erased adapter with its report and card.

    `elm publish --adapter outputs/demo/adapter --repo_id erased-capitals --base_model org/name --dry_run`
    stages the folder that would go up and lists it; without `--dry_run` it goes up, in one commit, to a private repository.
    Reads `report.json` and, if there is one, `attacks.json` beside the adapter.
    """
    [arguments] = CommandLine("publish", publish.__doc__, argv, own=PublishArguments).early()
    check_adapter(arguments.adapter)
    hush_libraries()
    from rich.console import Console
    from rich.table import Table

    from .. import CardDetails, PublishOptions, publish_adapter, read_questions

    folder = Path(arguments.adapter).parent
    attacks = arguments.attacks or (folder / "attacks.json" if (folder / "attacks.json").exists() else None)
    settings = vars(arguments) | {"allow": dict(entry.partition("=")[::2] for entry in arguments.allow or ())}
    publication = publish_adapter(
        arguments.adapter,
        arguments.repo_id,
        report=arguments.report or folder / "report.json",
        attacks=attacks,
        questions=arguments.bank and [question for path in arguments.bank for question in read_questions(path)],
        model=arguments.model,
        details=CardDetails.pop_from(settings),
        options=PublishOptions.pop_from(settings),
    )
    table = Table("file", "bytes", title=arguments.staging_dir)
    for path in sorted(Path(arguments.staging_dir).iterdir()):
        table.add_row(path.name, f"{path.stat().st_size:,}")
    console = Console()
    console.print(table)
    console.print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in publication.seconds.items()))
    if arguments.dry_run:
        console.print(f"Dry run: nothing was sent to {publication.url}.")
    elif publication.changed:
        where = publication.pull_request or f"commit {publication.commit}"
        console.print(f"Published: {publication.url} ({where}).")
    else:
        console.print(f"{publication.url} holds the same already.")


@dataclass
class LeaderboardArguments:
    repos: list[str] = field(default_factory=list, metadata={"help": "Repositories or folders; all by default."})
    tag: str = field(default="elm-trainer", metadata={"help": "Tag of the repositories."})
    sort: str = field(default="innocence", metadata={"help": "Column to rank by.", "choices": SORTS})
    output: str | None = field(default=None, metadata={"help": "File to write: .md, .json or .csv."})


def leaderboard(argv: list[str] | None = None) -> None:
    """Compare published erasures by the metadata of their cards: `elm leaderboard --output leaderboard.md`.

    Without `--repos` every repository with the tag is read. Endpoint and token come from `HF_ENDPOINT` and `HF_TOKEN`.
    """
    [arguments] = CommandLine("leaderboard", leaderboard.__doc__, argv, own=LeaderboardArguments).early()
    hush_libraries()
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..hub.leaderboard import HEADER, NOTE, cells, find_cards, rank, read_entries, title, write_leaderboard

    cards, unread = find_cards(arguments.repos, tag=arguments.tag)
    entries, unclear = read_entries(cards)
    groups, skipped = rank(entries, arguments.sort), [*unread, *unclear]

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # into a file or a pipe: nothing is cut
    for group in groups:
        table = Table(*HEADER, title=title(group))
        for entry in group.entries:
            # As Text: what strangers wrote must not be read as markup.
            table.add_row(*map(Text, cells(entry)))
        console.print(table)
    console.print(Text(NOTE))
    for left_out in skipped:
        console.print(Text(f"Skipped {left_out.repo}: {left_out.reason}"))
    if arguments.output:
        write_leaderboard(arguments.output, groups, skipped)
