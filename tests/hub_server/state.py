"""Everything that the Hub knows: users, repositories, contents, and who may do what."""

import hashlib
import hmac
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlencode

from .messages import COPY_CHUNK, Refusal, Request
from .repository import Blob, Commit, Repo


T = TypeVar("T")
DEFAULT_BRANCH = "refs/heads/main"

# What the Hub puts into a new repository: these files go to the large file storage, whatever their size.
LARGE_FILE_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz "
    "*.wasm *.xz *.zip *.zst *tfevents*"
).split()


def large_file_line(pattern: str) -> str:
    """A line of `.gitattributes`."""
    return f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Upload:
    """What a client announced, and what has arrived.

    Args:
        repo (`Repo`): Where it belongs.
        sha256, size (`str`, `int`): What was announced.
        folder (`Path`): Where parts and the whole lie until it is checked.
        parts (`int`): How many are expected; 0 if it comes as a whole.
    """

    repo: Repo
    sha256: str
    size: int
    folder: Path
    parts: int
    etags: dict[int, str] = field(default_factory=dict)

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    def part(self, number: int) -> Path:
        return self.folder / str(number)

    def took_part(self, number: int) -> str:
        """Note that a part arrived.

        Returns:
            `str`: Its ETag.
        """
        self.etags[number] = digest_of(self.part(number), "md5")
        return self.etags[number]

    def complete(self, etags: dict[int, str]) -> None:
        """Put the parts together; asked again, because the answer was lost, there is nothing left to do."""
        if etags != self.etags or len(etags) != self.parts:
            raise Refusal(400, "The parts are not those that were uploaded")
        if self.whole.exists():
            return
        with self.whole.open("wb") as whole:
            for number in range(1, self.parts + 1):
                with self.part(number).open("rb") as part:
                    while chunk := part.read(COPY_CHUNK):
                        whole.write(chunk)
                self.part(number).unlink()

    def check(self) -> None:
        """Raise if what arrived is not what was announced."""
        if not self.whole.exists():
            raise Refusal(404, f"Object {self.sha256} was not uploaded")
        if self.whole.stat().st_size != self.size or digest_of(self.whole, "sha256") != self.sha256:
            raise Refusal(422, f"Object {self.sha256} is not what was announced: wrong size or SHA-256")


def digest_of(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


@dataclass(frozen=True)
class User:
    """Somebody with a token.

    Args:
        name (`str`): Also the namespace.
        can_write (`bool`): What the token allows.
        orgs (`tuple[str, ...]`): Further namespaces.
    """

    name: str
    can_write: bool
    orgs: tuple[str, ...]

    def belongs_to(self, namespace: str) -> bool:
        return namespace in (self.name, *self.orgs)


class State:
    """Users, repositories and contents.

    Args:
        root (`Path`): Folder for large files.
        multipart_from (`int`): Bytes from which a large file is uploaded in parts.
        part_size (`int`): Bytes of a part.
        page_size (`int`): Entries of a page of any list.
    """

    def __init__(self, root: Path, *, multipart_from: int, part_size: int, page_size: int):
        self.root = root
        self.multipart_from = multipart_from
        self.part_size = part_size
        self.page_size = page_size
        self.endpoint = ""
        self.storage_endpoint = ""
        self.lock = threading.RLock()  # held by whatever reads or changes repositories, so that commits are atomic
        self.users: dict[str, User] = {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.contents: dict[str, bytes] = {}  # oid of a regular blob -> content
        self.uploads: dict[str, Upload] = {}
        self._secret = secrets.token_bytes(16)
        for folder in ("large", "incoming"):
            (root / folder).mkdir(parents=True, exist_ok=True)

    # Contents

    def large_file(self, sha256: str) -> Path:
        return self.root / "large" / sha256

    def put(self, content: bytes) -> Blob:
        blob = Blob.regular(content)
        self.contents[blob.oid] = content
        return blob

    def read(self, blob: Blob) -> bytes:
        return self.large_file(blob.sha256).read_bytes() if blob.sha256 else self.contents[blob.oid]

    # Signed addresses: the storage knows no users, it takes whatever the Hub signed.

    def sign(self, path: str) -> str:
        signature = hmac.new(self._secret, path.encode(), hashlib.sha256).hexdigest()
        return f"{path}?signature={signature}"

    def check_signature(self, request: Request) -> None:
        expected = self.sign(request.path).partition("signature=")[2]
        if not hmac.compare_digest(request.option("signature") or "", expected):
            raise Refusal(403, "SignatureDoesNotMatch")

    # Who may do what

    def user(self, request: Request) -> User | None:
        """Who asks; `None` without a token."""
        if request.token is None:
            return None
        user = self.users.get(request.token)
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def signed_in(self, request: Request) -> User:
        user = self.user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def writer(self, request: Request, namespace: str) -> User:
        """Who asks, if they may write in `namespace`."""
        user = self.signed_in(request)
        if not user.can_write:
            raise Refusal(403, "You must use a write token to upload to a repository.")
        if not user.belongs_to(namespace):
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{namespace}"')
        return user

    def may_read(self, user: User | None, repo: Repo) -> bool:
        return not repo.private or (user is not None and user.belongs_to(repo.namespace))

    def repo(self, request: Request) -> Repo:
        """The repository that the path names, if whoever asks may read it."""
        user = self.user(request)
        repo = self.repos.get((repo_type(request.args), request.args["repo"]))
        if repo is None or not self.may_read(user, repo):
            # The Hub does not tell strangers whether a repository is missing or private.
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def repo_to_write(self, request: Request) -> tuple[Repo, User]:
        repo = self.repo(request)
        return repo, self.writer(request, repo.namespace)

    def repo_to_propose(self, request: Request) -> tuple[Repo, User]:
        """The repository, if whoever asks may open a pull request there."""
        repo = self.repo(request)
        user = self.signed_in(request)
        if not user.can_write:
            raise Refusal(403, "You must use a write token to upload to a repository.")
        return repo, user

    def commit_of(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def add_commit(
        self, repo: Repo, ref: str, files: Mapping[str, Blob], title: str, message: str, author: str
    ) -> Commit:
        """Move `ref` to a new commit."""
        parents = (repo.refs[ref],) if ref in repo.refs else ()
        commit = Commit.make(files, parents, title, message, author)
        repo.commits[commit.oid] = commit
        repo.refs[ref] = commit.oid
        return commit

    def page_of(self, request: Request, items: Sequence[T], most: int) -> tuple[Sequence[T], dict[str, str]]:
        """The page of `items` that was asked for, and the header that points to the next one."""
        size = min(most, self.page_size)
        start = int(request.option("cursor") or 0)
        end = start + size
        if end >= len(items):
            return items[start:end], {}
        query = urlencode(request.query | {"cursor": [str(end)]}, doseq=True)
        return items[start:end], {"Link": f'<{self.endpoint}{request.path}?{query}>; rel="next"'}


def repo_type(args: Mapping[str, str]) -> str:
    """Type of the repository that a path names: `models/` or `datasets/` in the API, `datasets/` or nothing elsewhere."""
    return "dataset" if args.get("kind") in ("datasets", "datasets/") else "model"
