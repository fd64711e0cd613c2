"""One folder, one commit: what a repository holds afterwards is the old or the new, never half."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from .errors import (
    UNREADABLE,
    ConflictError,
    HubError,
    UploadError,
    bounded_waits,
    first_line,
    is_transient,
    named_errors,
    retried,
)


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


@dataclass(frozen=True)
class Target:
    """A repository as it was found: what a commit builds on."""

    repo_id: str
    repo_type: str  # "model" or "dataset"
    revision: str  # the branch
    head: str  # its newest commit
    files: dict[str, RepoFile]
    tags: dict[str, str]  # the commit of each


def url_of(api: HfApi, repo_id: str, repo_type: str) -> str:
    """The page of a repository."""
    return f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


def with_namespace(api: HfApi, repo_id: str) -> str:
    """The id of a repository, below the name of who is signed in where it has no namespace."""
    if "/" in repo_id:
        return repo_id
    with bounded_waits(), named_errors(repo_id, f"Opening {repo_id}"):
        return f"{retried(api.whoami)['name']}/{repo_id}"


def open_repository(
    api: HfApi, repo_id: str, *, repo_type: str = "model", private: bool | None = None, revision: str | None = None
) -> Target:
    """Find a repository and its branch, or make them: the branch from `main`, the repository private unless `private` is `False`.

    Raises:
        ValueError: if the repository is public and `private` is `True`, or private and it is `False`.
        NotSignedInError, PermissionDeniedError, UploadError: see [`named_errors`].
    """
    branch, repo_id = revision or "main", with_namespace(api, repo_id)
    with bounded_waits(), named_errors(repo_id, f"Opening {repo_id}"):
        try:
            info = retried(lambda: api.repo_info(repo_id, repo_type=repo_type))
        except RepositoryNotFoundError:
            retried(api.whoami)  # the Hub answers "not found" to an unknown token too
            # `exist_ok`: another process may make it in the same moment.
            retried(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private is not False, exist_ok=True))
            info = retried(lambda: api.repo_info(repo_id, repo_type=repo_type))
        if private is not None and bool(info.private) != private:
            raise ValueError(
                f"`private` is {private}, but {repo_id} is {'private' if info.private else 'public'}: change that in "
                "its settings, leave `private` out, or publish under another name."
            )
        refs = retried(lambda: api.list_repo_refs(repo_id, repo_type=repo_type))
        if branch not in {ref.name for ref in refs.branches}:
            retried(lambda: api.create_branch(repo_id, branch=branch, repo_type=repo_type, exist_ok=True))
        head = retried(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=branch)).sha
        assert head is not None
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        return Target(repo_id, repo_type, branch, head, _tree(api, repo_id, repo_type, head), tags)


def read_text(api: HfApi, target: Target, path: str) -> str | None:
    """A text file of the repository, or `None` where there is none."""
    if path not in target.files:
        return None
    with bounded_waits(), named_errors(target.repo_id, f"Reading {path} of {target.repo_id}"):
        where = {"repo_type": target.repo_type, "revision": target.head}
        try:
            return Path(retried(lambda: api.hf_hub_download(target.repo_id, path, **where))).read_text(
                encoding="utf-8"
            )
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
    api: HfApi,
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
    change = _Change(api, target, local, sorted(set(owned) & set(target.files) - set(local)), message, create_pr)
    unchanged = not change.stale and all(_same(path, target.files.get(name)) for name, path in local.items())
    if tag in target.tags and not (unchanged and target.tags[tag] == target.head):
        raise ValueError(
            f"`tag` is {tag!r}, which {target.repo_id} has on {target.tags[tag][:8]} already: choose another, or delete "
            "that one."
        )
    if unchanged:
        publication = change.publication(target.head, changed=False)
    else:
        with bounded_waits(), named_errors(target.repo_id, f"Committing to {target.repo_id}"):
            publication = _commit(change)
    commit = publication.commit
    assert commit is not None
    if publication.changed:
        _check_landed(change, commit)
    if tag and target.tags.get(tag) != commit:
        _set_tag(api, target, tag, commit)
    return publication


@dataclass(frozen=True)
class _Change:
    """What a commit is to do: files to write, by their names in the repository, and names to delete."""

    api: HfApi
    target: Target
    local: dict[str, Path]
    stale: list[str]
    message: str
    create_pr: bool

    def publication(self, commit: str, *, changed: bool = True, pull: str | None = None) -> Publication:
        url = url_of(self.api, self.target.repo_id, self.target.repo_type)
        return Publication(self.target.repo_id, commit, url, changed, pull)

    def tree(self, commit: str) -> dict[str, RepoFile]:
        return _tree(self.api, self.target.repo_id, self.target.repo_type, commit)

    def pulls(self) -> set[str]:
        """References of all pull requests."""
        where = {"repo_type": self.target.repo_type, "include_pull_requests": True}
        refs = retried(lambda: self.api.list_repo_refs(self.target.repo_id, **where))
        return {ref.ref for ref in refs.pull_requests or []}


def _commit(change: _Change) -> Publication:
    api, target = change.api, change.target
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

    def attempt() -> Publication:
        try:
            info = api.create_commit(
                target.repo_id, operations, commit_message=change.message, parent_commit=target.head, **where
            )
            if not additions or additions[0]._is_committed:
                made = change.publication(info.oid, pull=info.pr_revision if change.create_pr else None)
                return replace(made, url=info.pr_url or made.url)
            # Where the branch holds the same by now, the client sends nothing and returns the newest commit.
            failure: Exception = ConflictError(
                f"Somebody committed the same to {target.repo_id} meanwhile: publish again."
            )
        except (HfHubHTTPError, httpx2.TransportError, *UNREADABLE) as error:
            failure = error
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status not in (409, 412) and not is_transient(error):
                raise  # the Hub said that it made no commit
        # The answer may be lost, and the commit made all the same: by this attempt, or by one before it.
        try:
            landed = _landed(change, pulls)
        except (HfHubHTTPError, httpx2.TransportError, UploadError) as error:
            raise UploadError(
                f"The commit was sent to {target.repo_id}, but not whether it was made ({first_line(failure)}), and the "
                f"Hub cannot be asked ({first_line(error)}): publish again, which looks for it first."
            ) from error
        if landed is None:
            raise failure
        return landed

    return retried(attempt)


def _send_large_files(change: _Change, additions: list[CommitOperationAdd], where: dict[str, Any]) -> None:
    """Send the contents of large files ahead of the commit; the client tries that again by itself."""
    try:
        change.api.preupload_lfs_files(change.target.repo_id, additions, free_memory=False, **where)
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


def _landed(change: _Change, pulls: set[str]) -> Publication | None:
    """The commit whose answer was lost, if it was made."""
    api, target = change.api, change.target
    title = change.message.strip().partition("\n")[0].strip()
    for reference in sorted(change.pulls() - pulls if change.create_pr else {target.revision}):
        where = {"repo_type": target.repo_type, "revision": reference}
        found = retried(partial(api.list_repo_commits, target.repo_id, **where))
        newer = list(itertools.takewhile(lambda commit: commit.commit_id != target.head, found))
        for commit in reversed(newer):
            if commit.title.strip().partition("\n")[0].strip() == title and _holds(change, commit.commit_id):
                return change.publication(commit.commit_id, pull=reference if change.create_pr else None)
        if newer and not change.create_pr:
            raise ConflictError(
                f"Somebody committed {newer[0].commit_id[:8]} to {target.repo_id} meanwhile. Nothing of yours was "
                "committed: publish again to build on what is there now, or use `create_pr=True`."
            )
    return None


def _holds(change: _Change, commit: str) -> bool:
    """Whether a commit holds the folder, nothing stale, and all the rest of what was there before."""
    files, before, local = change.tree(commit), change.target.files, change.local
    expected = (set(before) | set(local)) - set(change.stale) - {_ATTRIBUTES}
    return set(files) - {_ATTRIBUTES} == expected and all(
        _same(local[name], files[name]) if name in local else files[name].blob_id == before[name].blob_id
        for name in expected
    )


def _check_landed(change: _Change, commit: str) -> None:
    repo_id = change.target.repo_id
    what, fix = "it could not be compared with what was sent", "publish again, which compares them"
    with _after(change.target, commit, what, fix):
        files = change.tree(commit)
    if wrong := [name for name, path in change.local.items() if not _same(path, files.get(name))]:
        raise UploadError(
            f"{repo_id} at {commit[:8]} holds other content than was sent for {', '.join(wrong)}: publish again, and "
            "tell the Hub."
        )


def _set_tag(api: HfApi, target: Target, tag: str, commit: str) -> None:
    kind = "" if target.repo_type == "model" else f", repo_type={target.repo_type!r}"
    how = f"`HfApi().create_tag({target.repo_id!r}, tag={tag!r}, revision={commit!r}{kind})`"
    with _after(target, commit, f"the tag {tag!r} was not set", f"set it with {how}, or publish again with `tag`"):
        retried(
            lambda: api.create_tag(target.repo_id, tag=tag, revision=commit, repo_type=target.repo_type, exist_ok=True)
        )
        refs = retried(lambda: api.list_repo_refs(target.repo_id, repo_type=target.repo_type))
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
        with bounded_waits(), named_errors(target.repo_id, what):
            yield
    except HubError as error:
        raise type(error)(
            f"{target.repo_id} holds what was sent as commit {commit}, but {what} "
            f"({first_line(error.__cause__ or error)}): {fix}."
        ) from error


def _tree(api: HfApi, repo_id: str, repo_type: str, revision: str) -> dict[str, RepoFile]:
    def read() -> dict[str, RepoFile]:
        entries = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    try:
        return retried(read)
    except RemoteEntryNotFoundError:  # what the Hub says of a commit without files
        return {}


def _same(path: Path, remote: RepoFile | None) -> bool:
    if remote is None or remote.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if remote.lfs is not None:
            return sha.sha_fileobj(file).hex() == remote.lfs.sha256
        return sha.git_hash(file.read()) == remote.blob_id
