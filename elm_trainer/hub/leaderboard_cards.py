"""Where the cards of a leaderboard come from: the Hub, by tag or by name, and local folders."""

from collections.abc import Sequence
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from .failures import named_errors, patience, retried
from .files import CARD
from .generated import TAG
from .leaderboard import Skipped
from .untrusted_yaml import MOST_BYTES


def find_cards(
    repos: Sequence[str] = (), *, tag: str = TAG, api: HfApi | None = None
) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """Read the cards of repositories and folders.

    The Hub's listing leaves the model-index out of what it says of a repository, and one card that the client cannot parse
    would end it. So only names are listed, and every card is downloaded (and kept in the cache), unless it is too large.

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
    cards, skipped = [], []
    with patience():
        # A folder here that is called like a repository of the listing is not meant.
        folders = {repo for repo in repos if Path(repo).is_dir()}
        if not repos:
            with named_errors(tag, f"Listing the repositories with the tag {tag}"):
                repos = retried(lambda: [model.id for model in api.list_models(filter=tag)])
        for repo in repos:
            try:
                path = Path(repo) / CARD if repo in folders else _download(repo, api)
                cards.append((repo, _read(path)))
            except (HfHubHTTPError, LocalEntryNotFoundError, httpx2.TransportError, OSError, ValueError) as error:
                skipped.append(Skipped(repo, str(error) or type(error).__name__))
    return cards, skipped


def _download(repo: str, api: HfApi) -> Path:
    found = api.get_hf_file_metadata(url=hf_hub_url(repo, CARD, endpoint=api.endpoint))
    _check_size(found.size or 0)
    return Path(api.hf_hub_download(repo, CARD, revision=found.commit_hash))


def _read(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no plain file")
    _check_size(path.stat().st_size)
    return path.read_text(encoding="utf-8-sig")


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"its card has {size:,} bytes, more than {MOST_BYTES:,}")
