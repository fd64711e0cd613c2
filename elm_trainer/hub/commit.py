"""One folder, one commit: what a repository holds afterwards is the old or the new, never half."""

import itertools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, GitCommitInfo, GitRefs, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from .errors import (
    ATTEMPTS,
    UNREADABLE,
    ConflictError,
    HubError,
    UploadError,
    first_line,
    named_errors,
    passing,
    patience,
    retried,
    unreadable,
    wait_before,
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
    """A repository as it was found: what a commit builds on.

    Args:
        repo_id (`str`): Repository.
        repo_type (`str`): `"model"` or `"dataset"`.
        revision (`str`): Branch.
        head (`str`): Its newest commit.
        files (`dict[str, RepoFile]`): What it holds.
        tags (`dict[str, str]`): Commit of each tag.
    """

    repo_id: str
    repo_type: str
    revision: str
    head: str
    files: dict[str, RepoFile]
    tags: dict[str, str]


def open_repository(
    api: HfApi, repo_id: str, *, repo_type: str = "model", private: bool | None = None, revision: str | None = None
) -> Target:
    """Find a repository and its branch, or make them.

    Args:
        api (`HfApi`): Client.
        repo_id (`str`): `name`, or `namespace/name`.
        repo_type (`str`, *optional*, defaults to `"model"`): `"model"` or `"dataset"`.
        private (`bool`, *optional*): Whether the repository must be private. `None`: it is made private, and an
            existing one stays as it is.
        revision (`str`, *optional*): Branch; `main` by default. It is made from `main` where it is missing.

    Raises:
        NotSignedInError: without a token that the Hub knows.
        PermissionDeniedError: if the token may not write there.
        ValueError: if the repository is public and `private` is `True`, or private and it is `False`.
        UploadError: if the Hub can't be reached, or what it answers cannot be read.
    """
    branch = revision or "main"
    with patience(), named_errors(repo_id, f"Opening {repo_id}"):
        if "/" not in repo_id:
            repo_id = f"{retried(api.whoami)['name']}/{repo_id}"
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
        head = _head(api, repo_id, repo_type, branch)
        return Target(
            repo_id,
            repo_type,
            branch,
            head,
            _tree(api, repo_id, repo_type, head),
            _tags(refs),
        )


def read_text(api: HfApi, target: Target, path: str) -> str | None:
    """A text file of the repository, or `None` where there is none."""
    if path not in target.files:
        return None
    with patience(), named_errors(target.repo_id, f"Reading {path} of {target.repo_id}"):
        try:
            found = retried(
                lambda: api.hf_hub_download(target.repo_id, path, repo_type=target.repo_type, revision=target.head)
            )
            return Path(found).read_text(encoding="utf-8")
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

    A commit whose answer was lost is looked for, by its content, before it is tried again, so that it is never made
    twice, and never taken for somebody else's. Nothing is committed where the repository holds the same already.

    Args:
        api (`HfApi`): Client.
        target ([`Target`]): What [`open_repository`] found.
        folder (`str` or `Path`): Its files go up; local files are only read.
        message (`str`): Message of the commit.
        owned (`Collection[str]`, *optional*): Names that are removed from the repository where the folder lacks them.
        create_pr (`bool`, *optional*, defaults to `False`): Whether to open a pull request instead.
        tag (`str`, *optional*): Tag to set on the commit.

    Raises:
        ConflictError: if somebody else committed meanwhile.
        PermissionDeniedError: if the token may not write there.
        UploadError: if the Hub could not be reached, or kept failing. After the commit these errors name it, and how to
            set the tag.
        ValueError: if the tag exists on another commit, or goes with a pull request, or if the repository's
            `.gitignore` leaves out a file of the folder.
    """
    folder = Path(folder)
    local = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = sorted(set(owned) & set(target.files) - set(local))
    unchanged = not stale and all(_same(path, target.files.get(name)) for name, path in local.items())
    check_tag(target, tag, create_pr, unchanged)
    if unchanged:
        publication = Publication(target.repo_id, target.head, _url(api, target), changed=False)
    else:
        with patience(), named_errors(target.repo_id, f"Committing to {target.repo_id}"):
            publication = _commit(api, target, local, stale, message, create_pr)
        _check_landed(api, target, local, publication)
    commit = publication.commit
    assert commit is not None
    if tag and target.tags.get(tag) != commit:
        _set_tag(api, target, tag, commit)
    return publication


def check_tag(target: Target, tag: str | None, create_pr: bool, unchanged: bool = False) -> None:
    """Raise `ValueError` where a tag can't be set."""
    if tag and create_pr:
        raise ValueError(
            f"`tag` is {tag!r}, but a pull request is no commit of the branch yet: tag it when it is merged."
        )
    if tag in target.tags and not (unchanged and target.tags[tag] == target.head):
        raise ValueError(
            f"`tag` is {tag!r}, which {target.repo_id} has on {target.tags[tag][:8]} already: choose another, or delete "
            "that one."
        )


def _commit(
    api: HfApi, target: Target, local: dict[str, Path], stale: list[str], message: str, create_pr: bool
) -> Publication:
    pulls = _pulls(api, target) if create_pr else set()
    additions = [CommitOperationAdd(name, path) for name, path in local.items()]
    _send_large_files(api, target, additions, create_pr)
    if ignored := [addition.path_in_repo for addition in additions if addition._should_ignore]:
        raise ValueError(
            f"The `.gitignore` of {target.repo_id} leaves out {', '.join(ignored)}: remove those lines there, and "
            "publish again."
        )
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    for attempt in range(ATTEMPTS):
        failure: Exception
        try:
            info = api.create_commit(
                target.repo_id,
                operations,
                commit_message=message,
                repo_type=target.repo_type,
                revision=target.revision,
                parent_commit=target.head,
                create_pr=create_pr,
            )
            if not additions or additions[0]._is_committed:
                where, pull = info.pr_url or _url(api, target), info.pr_revision if create_pr else None
                return Publication(target.repo_id, info.oid, where, True, pull)
            # Where the branch holds the same by now, the client sends nothing and returns the newest commit.
            failure = ConflictError(f"Somebody committed the same to {target.repo_id} meanwhile: publish again.")
        except (HfHubHTTPError, httpx2.TransportError, *UNREADABLE) as error:
            failure = error
        if _refused(failure):
            raise failure
        # The answer may be lost, and the commit made all the same: by this attempt, or by one before it.
        try:
            landed = _landed(api, target, local, stale, message, pulls if create_pr else None)
        except (HfHubHTTPError, httpx2.TransportError, UploadError) as error:
            raise UploadError(
                f"The commit was sent to {target.repo_id}, but not whether it was made ({first_line(failure)}), and the "
                f"Hub cannot be asked ({first_line(error)}): publish again, which looks for it first."
            ) from error
        if landed is not None:
            return landed
        if isinstance(failure, ConflictError) or _status(failure) in (409, 412):
            raise failure
        if attempt == ATTEMPTS - 1:
            if isinstance(failure, UNREADABLE):
                raise unreadable(failure) from failure
            raise failure
        wait_before(attempt, failure)
    raise AssertionError("unreachable")


def _status(failure: Exception) -> int | None:
    return failure.response.status_code if isinstance(failure, HfHubHTTPError) else None


def _refused(failure: Exception) -> bool:
    """Whether the Hub said that it made no commit."""
    return isinstance(failure, HfHubHTTPError) and not passing(failure) and _status(failure) not in (409, 412)


def _send_large_files(api: HfApi, target: Target, additions: list[CommitOperationAdd], create_pr: bool) -> None:
    """Send the contents of large files ahead of the commit; the client tries that again by itself."""
    try:
        api.preupload_lfs_files(
            target.repo_id,
            additions,
            repo_type=target.repo_type,
            revision=target.revision,
            create_pr=create_pr,
            free_memory=False,
        )
    except (RuntimeError, ConnectionError) as error:  # what the client, and Xet below it, make of any failure
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            raise cause from error
        raise _not_sent(target, cause) from error
    except (ValueError, *UNREADABLE) as error:  # an answer in another form than the Hub's
        raise _not_sent(target, error) from error


def _not_sent(target: Target, cause: BaseException) -> UploadError:
    return UploadError(
        f"Sending large files to {target.repo_id}: {first_line(cause)}. What it held before is unchanged: publish again."
    )


def _landed(
    api: HfApi, target: Target, local: dict[str, Path], stale: list[str], message: str, pulls: set[str] | None
) -> Publication | None:
    """The commit whose answer was lost, if it was made."""
    references = {target.revision} if pulls is None else _pulls(api, target) - pulls
    for reference in sorted(references):
        made = _since(api, target, reference)
        for commit in made:
            if _title(commit.title) == _title(message) and _holds(api, target, local, stale, commit.commit_id):
                pull = None if pulls is None else reference
                return Publication(target.repo_id, commit.commit_id, _url(api, target), True, pull)
        if made and pulls is None:
            raise ConflictError(
                f"Somebody committed {made[-1].commit_id[:8]} to {target.repo_id} meanwhile. Nothing of yours was "
                "committed: publish again to build on what is there now, or use `create_pr=True`."
            )
    return None


def _title(message: str) -> str:
    return message.strip().partition("\n")[0].strip()


def _since(api: HfApi, target: Target, reference: str) -> list[GitCommitInfo]:
    """Commits on top of `target.head`, the oldest first."""
    found = retried(lambda: api.list_repo_commits(target.repo_id, repo_type=target.repo_type, revision=reference))
    newer = itertools.takewhile(lambda commit: commit.commit_id != target.head, found)
    return list(newer)[::-1]


def _holds(api: HfApi, target: Target, local: dict[str, Path], stale: list[str], commit: str) -> bool:
    """Whether a commit holds the folder, nothing stale, and of `target` all the rest."""
    files = _tree(api, target.repo_id, target.repo_type, commit)
    expected = (set(target.files) | set(local)) - set(stale) - {_ATTRIBUTES}
    if set(files) - {_ATTRIBUTES} != expected:
        return False
    return all(
        _same(local[name], files[name]) if name in local else files[name].blob_id == target.files[name].blob_id
        for name in expected
    )


def _check_landed(api: HfApi, target: Target, local: dict[str, Path], publication: Publication) -> None:
    commit = publication.commit
    assert commit is not None
    with _after(target, commit, "it could not be compared with what was sent", "publish again, which compares them"):
        files = _tree(api, target.repo_id, target.repo_type, commit)
    if wrong := [name for name, path in local.items() if not _same(path, files.get(name))]:
        raise UploadError(
            f"{target.repo_id} at {commit[:8]} holds other content than was sent for {', '.join(wrong)}: "
            "publish again, and tell the Hub."
        )


def _set_tag(api: HfApi, target: Target, tag: str, commit: str) -> None:
    kind = "" if target.repo_type == "model" else f", repo_type={target.repo_type!r}"
    how = f"`HfApi().create_tag({target.repo_id!r}, tag={tag!r}, revision={commit!r}{kind})`"
    with _after(target, commit, f"the tag {tag!r} was not set", f"set it with {how}, or publish again with `tag`"):
        retried(
            lambda: api.create_tag(target.repo_id, tag=tag, revision=commit, repo_type=target.repo_type, exist_ok=True)
        )
        found = _tags(retried(lambda: api.list_repo_refs(target.repo_id, repo_type=target.repo_type))).get(tag)
    # Somebody else may have set it in the same moment, which `exist_ok` is silent about.
    if found != commit:
        raise ConflictError(
            f"{target.repo_id} holds what was sent as commit {commit}, but the tag {tag!r} is on {str(found)[:8]} by now: "
            "choose another, and set it with " + how.replace(repr(tag), "..."),
        )


@contextmanager
def _after(target: Target, commit: str, what: str, fix: str) -> Iterator[None]:
    """Let a failure after the commit say that the commit was made."""
    try:
        with patience(), named_errors(target.repo_id, what):
            yield
    except HubError as error:
        raise type(error)(
            f"{target.repo_id} holds what was sent as commit {commit}, but {what} "
            f"({first_line(error.__cause__ or error)}): {fix}."
        ) from error


def _tags(refs: GitRefs) -> dict[str, str]:
    return {ref.name: ref.target_commit for ref in refs.tags}


def _head(api: HfApi, repo_id: str, repo_type: str, reference: str) -> str:
    sha = retried(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=reference)).sha
    assert sha is not None
    return sha


def _tree(api: HfApi, repo_id: str, repo_type: str, revision: str) -> dict[str, RepoFile]:
    def read() -> dict[str, RepoFile]:
        entries = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    try:
        return retried(read)
    except RemoteEntryNotFoundError:  # what the Hub says of a commit without files
        return {}


def _pulls(api: HfApi, target: Target) -> set[str]:
    refs = retried(lambda: api.list_repo_refs(target.repo_id, repo_type=target.repo_type, include_pull_requests=True))
    return {ref.ref for ref in refs.pull_requests or []}


def _same(path: Path, remote: RepoFile | None) -> bool:
    if remote is None or remote.size != path.stat().st_size:
        return False
    with path.open("rb") as file:
        if remote.lfs is not None:
            return sha.sha_fileobj(file).hex() == remote.lfs.sha256
        return sha.git_hash(file.read()) == remote.blob_id


def _url(api: HfApi, target: Target) -> str:
    prefix = "" if target.repo_type == "model" else f"{target.repo_type}s/"
    return f"{api.endpoint}/{prefix}{target.repo_id}"
