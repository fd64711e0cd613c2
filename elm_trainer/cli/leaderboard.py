"""Compare published erasures by the metadata of their cards: `elm leaderboard --output leaderboard.md`.

Without `--repos` every repository with the tag is read. Endpoint and token come from `HF_ENDPOINT` and `HF_TOKEN`.
"""

from dataclasses import dataclass, field

from .options import CommandLine


SORTS = ("innocence", "r_ppl", "fall", "perplexity", "worst_pmi", "worst_names_answer")


@dataclass
class LeaderboardArguments:
    repos: list[str] = field(default_factory=list, metadata={"help": "Repositories or folders; all by default."})
    tag: str = field(default="elm-trainer", metadata={"help": "Tag of the repositories."})
    sort: str = field(default="innocence", metadata={"help": "Column to rank by.", "choices": SORTS})
    output: str | None = field(default=None, metadata={"help": "File to write: .md, .json or .csv."})


def main(argv: list[str] | None = None) -> None:
    [arguments] = CommandLine("leaderboard", __doc__, argv, own=LeaderboardArguments).early()
    from . import hush_libraries

    hush_libraries()
    # After the options are read, so that neither --help nor a wrong one need wait for torch.
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
