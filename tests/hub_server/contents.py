"""Everything that the Hub holds: users, repositories with their commits, contents, and who may read and write them."""

import hashlib
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch

from .faults import Refusal, Request


DEFAULT_BRANCH = "refs/heads/main"
# Some of what the Hub sends to its storage of large files, whatever their size, by the `.gitattributes` of a new repository.
LARGE_FILE_PATTERNS = "*.bin *.gz *.npz *.parquet *.pickle *.pkl *.pt *.pth *.safetensors *.tar *.zip".split()


def large_file_line(pattern: str) -> str:
    """A line of `.gitattributes`."""
    return f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"


def matches(patterns: str, path: str) -> bool:
    """Whether a line of `.gitattributes` or `.gitignore` names a file, by its path or by its name."""
    names = [line.split()[0] for line in patterns.splitlines() if line.strip()]
    return any(fnmatch(path, name) or fnmatch(path.rpartition("/")[2], name) for name in names)


@dataclass(frozen=True)
class Blob:
    """A file of a commit.

    Args:
        oid (`str`): Git's sha1: of the content, or of the pointer for a large file.
        size (`int`): Bytes of the content.
        sha256 (`str`, *optional*): Set for a large file.
    """

    oid: str
    size: int
    sha256: str | None = None

    @classmethod
    def of(cls, content: bytes, *, large: bool = False) -> "Blob":
        sha256 = hashlib.sha256(content).hexdigest() if large else None
        stored = content
        if sha256:
            stored = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        return cls(hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest(), len(content), sha256)

    @property
    def key(self) -> str:
        """By which the content is stored, and the client's cache names it."""
        return self.sha256 or self.oid


@dataclass(frozen=True, eq=False)
class Commit:
    """A state of all files, and where it came from."""

    files: Mapping[str, Blob]
    title: str
    message: str
    author: str
    parent: "Commit | None" = None
    oid: str = field(default_factory=lambda: secrets.token_hex(20))
    date: datetime = field(default_factory=lambda: datetime.now(UTC))

    def history(self) -> list["Commit"]:
        """This commit and what it came from, last first."""
        return [self, *(self.parent.history() if self.parent else ())]


@dataclass
class Repo:
    """A repository.

    Args:
        id (`str`): `namespace/name`.
        type (`str`): `"model"` or `"dataset"`.
        private (`bool`): Whether only the namespace may read it.
        refs (`dict[str, Commit]`): By full name: `refs/heads/main`, `refs/tags/v1`, `refs/pr/1`.
        large_files (`set[str]`): SHA-256 of the large files that were uploaded to it.
    """

    id: str
    type: str
    private: bool
    refs: dict[str, Commit] = field(default_factory=dict)
    large_files: set[str] = field(default_factory=set)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def url_path(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"

    def ref_of(self, revision: str) -> str | None:
        """Full name of the ref that `revision` means, if it is one."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def find(self, revision: str) -> Commit | None:
        """The commit behind a branch, tag, pull request, or a commit's id."""
        if ref := self.ref_of(revision):
            return self.refs[ref]
        commits = (commit for head in self.refs.values() for commit in head.history())
        return next((commit for commit in commits if commit.oid == revision), None)


@dataclass
class Upload:
    """A large file that was announced, and the parts of it that have arrived."""

    repo: Repo
    sha256: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)


class Contents:
    """Users, repositories and contents, all in memory.

    Args:
        endpoint, storage (`str`): Addresses of the Hub, and of its storage of large files.
    """

    def __init__(self, endpoint: str, storage: str):
        self.endpoint, self.storage = endpoint, storage
        self.lock = threading.RLock()  # held by whatever reads or changes repositories, so that commits are atomic
        self.users: dict[str, str] = {}  # token -> name
        self.repos: dict[tuple[str, str], Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.uploads: dict[str, Upload] = {}
        self.multipart_from, self.part_size = 16_000_000, 8_000_000
        self._secret = secrets.token_hex(16)

    def put(self, content: bytes, *, large: bool = False) -> Blob:
        blob = Blob.of(content, large=large)
        self.stored[blob.key] = content
        return blob

    def text_of(self, commit: Commit, path: str) -> str:
        """A text of a commit; empty where it has none of the name."""
        return self.stored[commit.files[path].key].decode() if path in commit.files else ""

    # Addresses of large files are signed: whoever has one may read or write there.

    def sign(self, path: str) -> str:
        return f"{self.storage}{path}?signature={self._secret}"

    def check_signature(self, request: Request) -> None:
        if request.query.get("signature") != [self._secret]:
            raise Refusal(403, "SignatureDoesNotMatch")

    # Who may do what

    def user(self, request: Request) -> str | None:
        """Who asks; `None` without a token."""
        if request.token is None:
            return None
        if request.token not in self.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.users[request.token]

    def signed_in(self, request: Request) -> str:
        user = self.user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def writer(self, request: Request, namespace: str) -> str:
        """Who asks, if they may write in `namespace`."""
        user = self.signed_in(request)
        if user != namespace:
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{namespace}"')
        return user

    def repo(self, request: Request) -> Repo:
        """The repository that the path names, if whoever asks may read it."""
        user = self.user(request)
        repo = self.repos.get((repo_type(request), request.args["repo"]))
        if repo is None or (repo.private and user != repo.namespace):
            # The Hub does not tell strangers whether a repository is missing or private.
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def repo_to_write(self, request: Request) -> Repo:
        repo = self.repo(request)
        self.writer(request, repo.namespace)
        return repo

    def commit_of(self, repo: Repo, request: Request) -> Commit:
        """The commit that the path names."""
        revision = request.args.get("revision", "main")
        commit = repo.find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


def repo_type(request: Request) -> str:
    """Type of the repository that a path names: `models` or `datasets` in the API, `datasets/` or nothing elsewhere."""
    return "dataset" if (request.args.get("kind") or "").startswith("datasets") else "model"
