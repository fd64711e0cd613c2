"""One folder, one commit: what a repository holds afterwards is the old or the new, never half."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import sha

from .errors import ConflictError, UploadError
from .failures import ATTEMPTS, named_errors, passing, patience, retried, wait_before


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
        UploadError: if the Hub can't be reached.
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
            {ref.name: ref.target_commit for ref in refs.tags},
        )


def read_text(api: HfApi, target: Target, path: str) -> str | None:
    """A text file of the repository, or `None` where there is none."""
    if path not in target.files:
        return None
    with patience(), named_errors(target.repo_id, f"Reading {path} of {target.repo_id}"):
        found = retried(
            lambda: api.hf_hub_download(target.repo_id, path, repo_type=target.repo_type, revision=target.head)
        )
        return Path(found).read_text(encoding="utf-8")


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

    A commit whose answer was lost is looked for before it is tried again, so that it is never made twice. Nothing is
    committed where the repository holds the same already.

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
        UploadError: if the Hub could not be reached, or kept failing.
        ValueError: if the tag exists on another commit, or goes with a pull request.
    """
    folder = Path(folder)
    local = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    stale = sorted(set(owned) & set(target.files) - set(local))
    unchanged = not stale and all(_same(path, target.files.get(name)) for name, path in local.items())
    check_tag(target, tag, create_pr, unchanged)
    what = f"Committing to {target.repo_id}"
    with patience(), named_errors(target.repo_id, what):
        if unchanged:
            publication = Publication(target.repo_id, target.head, _url(api, target), changed=False)
        else:
            publication = _commit(api, target, local, stale, message, create_pr)
            _check_landed(api, target, local, publication)
    commit = publication.commit
    assert commit is not None
    if tag and target.tags.get(tag) != commit:
        with patience(), named_errors(target.repo_id, f"{commit[:8]} is published, but tagging it {tag!r}"):
            retried(
                lambda: api.create_tag(
                    target.repo_id, tag=tag, revision=commit, repo_type=target.repo_type, exist_ok=True
                )
            )
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
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    for attempt in range(ATTEMPTS):
        try:
            info: CommitInfo = api.create_commit(
                target.repo_id,
                operations,
                commit_message=message,
                repo_type=target.repo_type,
                revision=target.revision,
                parent_commit=target.head,
                create_pr=create_pr,
            )
            return Publication(
                target.repo_id,
                info.oid,
                info.pr_url or _url(api, target),
                True,
                info.pr_revision if create_pr else None,
            )
        except (HfHubHTTPError, httpx2.TransportError) as error:
            if not passing(error):
                raise
            # The answer may be lost, and the commit made all the same.
            if landed := _landed(api, target, local, stale, pulls if create_pr else None):
                return landed
            if attempt == ATTEMPTS - 1:
                raise
            wait_before(attempt, error)
    raise AssertionError("unreachable")


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
        raise UploadError(
            f"Sending large files to {target.repo_id}: {cause}. What it held before is unchanged: publish again."
        ) from error


def _landed(
    api: HfApi, target: Target, local: dict[str, Path], stale: list[str], pulls: set[str] | None
) -> Publication | None:
    """The commit whose answer was lost, if it was made."""
    references = {target.revision} if pulls is None else _pulls(api, target) - pulls
    for reference in sorted(references):
        head = _head(api, target.repo_id, target.repo_type, reference)
        if head == target.head:
            continue
        files = _tree(api, target.repo_id, target.repo_type, head)
        if all(_same(path, files.get(name)) for name, path in local.items()) and not set(stale) & set(files):
            pull = None if pulls is None else reference
            return Publication(target.repo_id, head, _url(api, target), changed=True, pull_request=pull)
        if pulls is None:
            raise ConflictError(
                f"Somebody committed {head[:8]} to {target.repo_id} meanwhile. Nothing of yours was committed: "
                "publish again to build on what is there now, or use `create_pr=True`."
            )
    return None


def _check_landed(api: HfApi, target: Target, local: dict[str, Path], publication: Publication) -> None:
    assert publication.commit is not None
    files = _tree(api, target.repo_id, target.repo_type, publication.commit)
    if wrong := [name for name, path in local.items() if not _same(path, files.get(name))]:
        raise UploadError(
            f"{target.repo_id} at {publication.commit[:8]} holds other content than was sent for {', '.join(wrong)}: "
            "publish again, and tell the Hub."
        )


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
