"""Where the cards of a leaderboard come from: the Hub, by tag or by name, and local folders."""

from collections.abc import Sequence
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from .failures import named_errors
from .files import CARD
from .generated import TAG
from .leaderboard import Skipped


def find_cards(
    repos: Sequence[str] = (), *, tag: str = TAG, api: HfApi | None = None
) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """Read the cards of repositories and folders.

    The Hub's listing leaves the model-index out of what it says of a repository, and one card that the client cannot parse
    would end it. So only names are listed, and every card is downloaded (and kept in the cache).

    Args:
        repos (`Sequence[str]`, *optional*): Repositories or local folders. Defaults to every repository with the tag.
        tag (`str`, *optional*, defaults to `"elm-trainer"`): Tag of the repositories.
        api (`HfApi`, *optional*): Client. The default takes endpoint and token from the environment.

    Returns:
        `tuple`: pairs of name and text of the card, and what could not be read.

    Raises:
        HubError: if the Hub cannot list the repositories with the tag.
    """
    api = api or HfApi()
    if not repos:
        with named_errors(tag, f"Listing the repositories with the tag {tag}"):
            repos = [model.id for model in api.list_models(filter=tag)]
    cards, skipped = [], []
    for repo in repos:
        try:
            cards.append((repo, _read(repo, api)))
        except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, OSError, ValueError) as error:
            skipped.append(Skipped(repo, " ".join(str(error).split()) or type(error).__name__))
    return cards, skipped


def _read(repo: str, api: HfApi) -> str:
    path = Path(repo) / CARD if Path(repo).is_dir() else Path(api.hf_hub_download(repo, CARD))
    return path.read_text(encoding="utf-8-sig")
