"""A staged folder goes up with its card in one commit: what a repository holds afterwards is the old or the new, never half."""

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from .errors import UNREADABLE, ConflictError, HubError, UploadError, first_line, is_transient, named_errors, retried
from .info import CARD
from .safety import check_names


if TYPE_CHECKING:
    from .publish import PublishOptions


# The Hub keeps a list of large files there.
_ATTRIBUTES = ".gitattributes"


@dataclass(frozen=True)
class Publication:
    """What was published.

    Args:
        repo_id (`str`): Repository.
        commit (`str` or `None`): Commit that holds it; `None` after a dry run.
        url (`str`): Where to look at it.
        changed (`bool`): Whether there was anything to commit.
        pull_request (`str`, *optional*): Reference of the pull request, such as `refs/pr/1`.
        seconds (`dict[str, float]`): Duration of each step.
    """

    repo_id: str
    commit: str | None
    url: str
    changed: bool
    pull_request: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@contextmanager
def lap(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the duration of a block to those of its name."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def send_folder(
    api: HfApi,
    repo_id: str,
    folder: Path,
    write_card: Callable[[str | None], None],
    options: "PublishOptions",
    *,
    repo_type: str = "model",
    owned: Collection[str],
    what: str,
    seconds: dict[str, float],
) -> Publication:
    """Write the card of a staged folder, and send the folder unless this is a dry run.

    `write_card` takes a card, keeps what a person wrote into it, and raises for what the scan of the folder finds. The
    repository is named with its namespace, unless this is a dry run. Durations are added to `seconds`.
    """
    card = folder / CARD
    with lap(seconds, "scan"):
        write_card(card.read_text(encoding="utf-8") if card.exists() else None)
    if options.dry_run:
        return Publication(repo_id, None, Target(api, repo_id, repo_type).url, changed=False, seconds=seconds)
    with lap(seconds, "transfer"):
        target = open_repository(api, repo_id, repo_type=repo_type, private=options.private, revision=options.revision)
        if repo_type == "model":
            check_names(target.files, repo_id)  # `load_erased` would refuse what lies there already
        current = read_text(target, CARD)
    if current is not None:
        with lap(seconds, "scan"):
            write_card(current)
    message, create_pr, tag = options.commit_message or f"Publish {what}", options.create_pr, options.tag
    with lap(seconds, "transfer"):
        publication = commit_folder(target, folder, message=message, owned=owned, create_pr=create_pr, tag=tag)
    return replace(publication, seconds=seconds)


@dataclass(frozen=True)
class Target:
    """A repository as it was found: what a commit builds on."""

    api: HfApi
    repo_id: str
    repo_type: str  # "model" or "dataset"
    revision: str = "main"  # the branch
    head: str = ""  # its newest commit
    files: Mapping[str, RepoFile] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)  # the commit of each

    @property
    def url(self) -> str:
        """Its page."""
        return f"{self.api.endpoint}/{'' if self.repo_type == 'model' else f'{self.repo_type}s/'}{self.repo_id}"

    def ask(self, call: Callable[..., Any], **options: Any) -> Any:
        """What a method of `api` says of this repository, see [`retried`]."""
        return retried(lambda: call(self.repo_id, repo_type=self.repo_type, **options))

    def tree(self, commit: str) -> dict[str, RepoFile]:
        """The files of a commit."""

        def read(*repository: str, **options: Any) -> dict[str, RepoFile]:
            entries = self.api.list_repo_tree(*repository, recursive=True, **options)
            return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

        try:
            return self.ask(read, revision=commit)
        except RemoteEntryNotFoundError:  # what the Hub says of a commit without files
            return {}


def with_namespace(api: HfApi, repo_id: str) -> str:
    """The id of a repository, below the name of who is signed in where it has no namespace."""
    if "/" in repo_id:
        return repo_id
    with named_errors(repo_id, f"Opening {repo_id}"):
        return f"{retried(api.whoami)['name']}/{repo_id}"


def open_repository(
    api: HfApi, repo_id: str, *, repo_type: str = "model", private: bool | None = None, revision: str | None = None
) -> Target:
    """Find a repository and its branch, or make them: the branch from `main`, the repository private unless `private` is `False`.

    Raises:
        ValueError: if the repository is public and `private` is `True`, or private and it is `False`.
        NotSignedInError, PermissionDeniedError, UploadError: see [`named_errors`].
    """
    target = Target(api, with_namespace(api, repo_id), repo_type, revision or "main")
    repo_id, branch = target.repo_id, target.revision
    with named_errors(repo_id, f"Opening {repo_id}"):
        try:
            info = target.ask(api.repo_info)
        except RepositoryNotFoundError:
            retried(api.whoami)  # the Hub answers "not found" to an unknown token too
            # `exist_ok`: another process may make it in the same moment.
            target.ask(api.create_repo, private=private is not False, exist_ok=True)
            info = target.ask(api.repo_info)
        if private is not None and bool(info.private) != private:
            raise ValueError(
                f"`private` is {private}, but {repo_id} is {'private' if info.private else 'public'}: change that in "
                "its settings, leave `private` out, or publish under another name."
            )
        refs = target.ask(api.list_repo_refs)
        if branch not in {ref.name for ref in refs.branches}:
            target.ask(api.create_branch, branch=branch, exist_ok=True)
        head = target.ask(api.repo_info, revision=branch).sha
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        return replace(target, head=head, files=target.tree(head), tags=tags)


def read_text(target: Target, path: str) -> str | None:
    """A text file of the repository, or `None` where there is none."""
    if path not in target.files:
        return None
    with named_errors(target.repo_id, f"Reading {path} of {target.repo_id}"):
        try:
            file = target.ask(target.api.hf_hub_download, filename=path, revision=target.head)
            return Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} of {target.repo_id} is not text in UTF-8 ({error}): correct or delete it, and publish again."
            ) from error
        except HfHubHTTPError:
            raise
        except OSError as error:  # a file that came incomplete, or could not be written
            if isinstance(error.__cause__, (HfHubHTTPError, httpx2.TransportError)):
                raise error.__cause__ from error
            raise UploadError(
                f"{path} of {target.repo_id} could not be read whole ({first_line(error)}): publish again."
            ) from error


def commit_folder(
    target: Target,
    folder: str | Path,
    *,
    message: str,
    owned: Collection[str] = (),
    create_pr: bool = False,
    tag: str | None = None,
) -> Publication:
    """Commit the files of a folder on top of `target.head`.

    A commit whose answer was lost is looked for, by its content, before it is tried again: it is never made twice, and
    never taken for somebody else's. Nothing is committed where the repository holds the same already. Names in `owned` are
    removed from the repository where the folder lacks them.

    Raises:
        ConflictError: if somebody else committed meanwhile.
        PermissionDeniedError: if the token may not write there.
        UploadError: if the Hub could not be reached, or kept failing. After the commit these errors name it, and how
            to set the tag.
        ValueError: if the tag exists on another commit, or the repository's `.gitignore` leaves out a file of the folder.
    """
    folder = Path(folder)
    local = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    change = _Change(target, local, sorted(set(owned) & set(target.files) - set(local)), message, create_pr)
    unchanged = not change.stale and not change.others(target.files)
    tagged = target.tags.get(tag) if tag else None
    if tagged and not (unchanged and tagged == target.head):
        raise ValueError(
            f"`tag` is {tag!r}, which {target.repo_id} has on {tagged[:8]} already: choose another, or delete that one."
        )
    if unchanged:
        publication = replace(change.made(target.head), changed=False)
    else:
        with named_errors(target.repo_id, f"Committing to {target.repo_id}"):
            publication = _commit(change)
    commit = publication.commit
    assert commit is not None
    if publication.changed:
        _check_sent(change, commit)
    if tag and not tagged:
        _set_tag(target, tag, commit)
    return publication


@dataclass(frozen=True)
class _Change:
    """What a commit is to do: files to write, by their names in the repository, and names to delete."""

    target: Target
    local: dict[str, Path]
    stale: list[str]
    message: str
    create_pr: bool

    def made(self, commit: str, pull: str | None = None, url: str | None = None) -> Publication:
        pull = pull if self.create_pr else None
        return Publication(self.target.repo_id, commit, url or self.target.url, changed=True, pull_request=pull)

    def others(self, files: Mapping[str, RepoFile]) -> list[str]:
        """Names that are to be written and have other content, or none, among the files of a commit."""
        return [name for name, path in self.local.items() if not _same(path, files.get(name))]

    def pulls(self) -> set[str]:
        """References of all pull requests."""
        refs = self.target.ask(self.target.api.list_repo_refs, include_pull_requests=True)
        return {ref.ref for ref in refs.pull_requests or []}


def _commit(change: _Change) -> Publication:
    target, api = change.target, change.target.api
    pulls = change.pulls() if change.create_pr else set()
    additions = [CommitOperationAdd(name, path) for name, path in change.local.items()]
    where = {"repo_type": target.repo_type, "revision": target.revision, "create_pr": change.create_pr}
    _send_large_files(change, additions, where)
    if ignored := [addition.path_in_repo for addition in additions if addition._should_ignore]:
        raise ValueError(
            f"The `.gitignore` of {target.repo_id} leaves out {', '.join(ignored)}: remove those lines there, and "
            "publish again."
        )
    operations = [*additions, *map(CommitOperationDelete, change.stale)]

    def send() -> Publication | None:
        info = api.create_commit(
            target.repo_id, operations, commit_message=change.message, parent_commit=target.head, **where
        )
        # Where the branch holds the same by now, the client sends nothing and returns the newest commit.
        sent = not additions or additions[0]._is_committed
        return change.made(info.oid, info.pr_revision, info.pr_url) if sent else None

    def landed(failure: Exception) -> Publication | None:
        """The commit whose answer was lost, if it was made all the same: by this attempt, or by one before it."""
        if isinstance(failure, HfHubHTTPError) and not is_transient(failure):
            if failure.response.status_code not in (409, 412):
                return None  # the Hub said that it made no commit
        try:
            return _find_landed(change, pulls)
        except (HfHubHTTPError, httpx2.TransportError, UploadError) as error:
            raise UploadError(
                f"The commit was sent to {target.repo_id}, but not whether it was made ({first_line(failure)}), and the "
                f"Hub cannot be asked ({first_line(error)}): publish again, which looks for it first."
            ) from error

    conflict = ConflictError(f"Somebody committed the same to {target.repo_id} meanwhile: publish again.")
    if publication := retried(send, landed) or landed(conflict):
        return publication
    raise conflict


def _send_large_files(change: _Change, additions: list[CommitOperationAdd], where: dict[str, Any]) -> None:
    """Send the contents of large files ahead of the commit; the client tries that again by itself."""
    try:
        change.target.api.preupload_lfs_files(change.target.repo_id, additions, free_memory=False, **where)
        return
    except (RuntimeError, ConnectionError) as error:  # what the client, and Xet below it, make of any failure
        cause: BaseException = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            raise cause from error
    except (ValueError, *UNREADABLE) as error:  # an answer in another form than the Hub's
        cause = error
    raise UploadError(
        f"Sending large files to {change.target.repo_id}: {first_line(cause)}. What it held before is unchanged: publish "
        "again."
    ) from cause


def _find_landed(change: _Change, pulls: set[str]) -> Publication | None:
    """The commit of a change, if it was made."""
    target = change.target
    title = change.message.strip().partition("\n")[0].strip()
    for reference in sorted(change.pulls() - pulls if change.create_pr else {target.revision}):
        found = target.ask(target.api.list_repo_commits, revision=reference)
        newer = list(itertools.takewhile(lambda commit: commit.commit_id != target.head, found))
        for commit in reversed(newer):
            if commit.title.strip().partition("\n")[0].strip() == title and _holds(change, commit.commit_id):
                return change.made(commit.commit_id, reference)
        if newer and not change.create_pr:
            raise ConflictError(
                f"Somebody committed {newer[0].commit_id[:8]} to {target.repo_id} meanwhile. Nothing of yours was "
                "committed: publish again to build on what is there now, or use `create_pr=True`."
            )
    return None


def _holds(change: _Change, commit: str) -> bool:
    """Whether a commit holds the folder, nothing stale, and all the rest of what was there before."""
    files, before = change.target.tree(commit), change.target.files
    kept = set(before) - set(change.local) - set(change.stale) - {_ATTRIBUTES}
    return (
        set(files) - {_ATTRIBUTES} == kept | set(change.local) - {_ATTRIBUTES}
        and not change.others(files)
        and all(files[name].blob_id == before[name].blob_id for name in kept)
    )


def _check_sent(change: _Change, commit: str) -> None:
    what, fix = "it could not be compared with what was sent", "publish again, which compares them"
    with _after(change.target, commit, what, fix):
        files = change.target.tree(commit)
    if wrong := change.others(files):
        raise UploadError(
            f"{change.target.repo_id} at {commit[:8]} holds other content than was sent for {', '.join(wrong)}: publish "
            "again, and tell the Hub."
        )


def _set_tag(target: Target, tag: str, commit: str) -> None:
    kind = "" if target.repo_type == "model" else f", repo_type={target.repo_type!r}"
    how = f"`HfApi().create_tag({target.repo_id!r}, tag={tag!r}, revision={commit!r}{kind})`"
    with _after(target, commit, f"the tag {tag!r} was not set", f"set it with {how}, or publish again with `tag`"):
        target.ask(target.api.create_tag, tag=tag, revision=commit, exist_ok=True)
        refs = target.ask(target.api.list_repo_refs)
    found = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    # Somebody else may have set it in the same moment, which `exist_ok` is silent about.
    if found != commit:
        raise ConflictError(
            f"{target.repo_id} holds what was sent as commit {commit}, but the tag {tag!r} is on {str(found)[:8]} by now: "
            "choose another, and set it with " + how.replace(repr(tag), "...")
        )


@contextmanager
def _after(target: Target, commit: str, what: str, fix: str) -> Iterator[None]:
    """Let a failure after the commit say that the commit was made."""
    try:
        with named_errors(target.repo_id, what):
            yield
    except HubError as error:
        raise type(error)(
            f"{target.repo_id} holds what was sent as commit {commit}, but {what} "
            f"({first_line(error.__cause__ or error)}): {fix}."
        ) from error


def _same(path: Path, remote: RepoFile | None) -> bool:
    if remote is None or remote.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if remote.lfs is not None:
            return sha.sha_fileobj(file).hex() == remote.lfs.sha256
        return sha.git_hash(file.read()) == remote.blob_id
