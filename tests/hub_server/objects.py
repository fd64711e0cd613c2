"""What a repository is made of: content-addressed blobs, trees and commits, with the ids that git would give them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime


def git_oid(kind: str, content: bytes) -> str:
    """The sha1 that git gives to an object of `kind` (`blob`, `tree` or `commit`)."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def pointer_text(sha256: str, size: int) -> bytes:
    """What git stores in place of a file that is kept in the large file storage."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Blob:
    """A file of a commit.

    Args:
        oid (`str`): Git's sha1: of the content, or of the pointer for a large file.
        size (`int`): Bytes of the content.
        sha256 (`str`, *optional*): Set for a large file; its content lies in the storage under this name.
    """

    oid: str
    size: int
    sha256: str | None = None

    @classmethod
    def regular(cls, content: bytes) -> "Blob":
        return cls(git_oid("blob", content), len(content))

    @classmethod
    def large(cls, sha256: str, size: int) -> "Blob":
        return cls(git_oid("blob", pointer_text(sha256, size)), size, sha256)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


def tree_oids(files: Mapping[str, Blob]) -> dict[str, str]:
    """Git's sha1 of every folder, by path; the root is `""`."""
    folders: dict[str, dict[str, str | None]] = {"": {}}  # folder -> name -> oid, or None for a folder within
    for path, blob in files.items():
        parent, _, name = path.rpartition("/")
        folders.setdefault(parent, {})[name] = blob.oid
        while parent:
            folder = parent
            parent, _, name = folder.rpartition("/")
            folders.setdefault(parent, {})[name] = None
    oids: dict[str, str] = {}
    for folder in sorted(folders, key=lambda path: path.count("/") + bool(path), reverse=True):
        # Git sorts a folder as if its name ended with a slash.
        names = sorted(folders[folder].items(), key=lambda item: item[0] + "/" * (item[1] is None))
        content = b""
        for name, oid in names:
            inner = f"{folder}/{name}".lstrip("/")
            mode, oid = ("100644", oid) if oid else ("40000", oids[inner])
            content += f"{mode} {name}\0".encode() + bytes.fromhex(oid)
        oids[folder] = git_oid("tree", content)
    return oids


@dataclass(frozen=True)
class Commit:
    """A state of all files, and where it came from."""

    oid: str
    parents: tuple[str, ...]
    files: Mapping[str, Blob]
    title: str
    message: str
    author: str
    date: datetime

    @classmethod
    def make(
        cls, files: Mapping[str, Blob], parents: tuple[str, ...], title: str, message: str, author: str
    ) -> "Commit":
        """A commit of this moment."""
        date = datetime.now(UTC)
        who = f"{author} <{author}@users.noreply.localhost> {int(date.timestamp())} +0000"
        lines = [f"tree {tree_oids(files)['']}", *(f"parent {parent}" for parent in parents)]
        lines += [f"author {who}", f"committer {who}", "", f"{title}\n\n{message}".strip(), ""]
        return cls(git_oid("commit", "\n".join(lines).encode()), parents, dict(files), title, message, author, date)


@dataclass
class Discussion:
    """A discussion; one with a `base`, the ref that it wants to change, is a pull request."""

    num: int
    title: str
    description: str
    author: str
    status: str = "open"
    base: str | None = None
    merged_as: str | None = None
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """A repository.

    Args:
        id (`str`): `namespace/name`.
        type (`str`): `"model"` or `"dataset"`.
        private (`bool`): Whether only the namespace may read it.
        refs (`dict[str, str]`): Full name of a ref (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) -> commit.
        large_files (`set[str]`): sha256 of the large files that were uploaded to it.
    """

    id: str
    type: str
    private: bool
    gated: str | bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    large_files: set[str] = field(default_factory=set)
    discussions: dict[int, Discussion] = field(default_factory=dict)
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))

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
        """The commit behind a branch, tag, pull request, or (the first seven digits of) a commit's id."""
        ref = self.ref_of(revision)
        if ref:
            return self.commits[self.refs[ref]]
        if len(revision) < 7:
            return None
        return next((commit for oid, commit in self.commits.items() if oid.startswith(revision)), None)

    def history(self, commit: Commit) -> list[Commit]:
        """`commit` and what it came from, last first."""
        found = [commit]
        while found[-1].parents:
            found.append(self.commits[found[-1].parents[0]])
        return found

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The last commit up to `commit` that changed the file or folder at `path`."""
        history = self.history(commit)
        for newer, older in zip(history, history[1:], strict=False):
            if oid_at(newer, path) != oid_at(older, path):
                return newer
        return history[-1]


def oid_at(commit: Commit, path: str) -> str | None:
    """Git's sha1 of the file or folder at `path`."""
    return commit.files[path].oid if path in commit.files else tree_oids(commit.files).get(path)
