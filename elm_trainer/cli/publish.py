"""Publish an erased adapter with its report and card.

`elm publish --adapter outputs/demo/adapter --repo_id erased-capitals --base_model org/name --dry_run`
stages the folder that would go up and lists it; without `--dry_run` it goes up, in one commit, to a private repository.
Reads `report.json` and, if there is one, `attacks.json` beside the adapter.
"""

from dataclasses import dataclass, field
from pathlib import Path

from .options import CommandLine, check_adapter


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


def main(argv: list[str] | None = None) -> None:
    [arguments] = CommandLine("publish", __doc__, argv, own=PublishArguments).early()
    check_adapter(arguments.adapter)
    from . import hush_libraries

    hush_libraries()
    # After the options are read, so that neither --help nor a wrong one need wait for torch.
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
