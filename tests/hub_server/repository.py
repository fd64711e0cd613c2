"""What a repository is made of: blobs, trees and commits with git's ids, its patterns of files, and the metadata of its card."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import yaml


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
class Repo:
    """A repository.

    Args:
        id (`str`): `namespace/name`.
        type (`str`): `"model"` or `"dataset"`.
        private (`bool`): Whether only the namespace may read it.
        refs (`dict[str, str]`): Full name of a ref (`refs/heads/main`, `refs/tags/v1`, `refs/pr/1`) -> commit.
        large_files (`set[str]`): sha256 of the large files that were uploaded to it.
        pulls (`int`): How many pull requests were opened.
    """

    id: str
    type: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    large_files: set[str] = field(default_factory=set)
    pulls: int = 0
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


def pattern_matches(pattern: str, path: str) -> bool:
    """Whether a file is what git means by `pattern`, or lies in a folder that is.

    A pattern without a slash is for names in any folder; `*` stays within a folder, `**` does not.
    """
    pattern, folder_only = pattern.rstrip("/"), pattern.endswith("/")
    anywhere = "/" not in pattern
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]*\])", pattern.lstrip("/"))
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = "".join(wild.get(piece, piece if piece.startswith("[") else re.escape(piece)) for piece in pieces)
    end = "/" if folder_only else "(?:/|$)"
    return re.match(("(?:.*/)?" if anywhere else "") + expression + end, path) is not None


def is_large_file(gitattributes: str, path: str) -> bool:
    """Whether `.gitattributes` sends `path` to the large file storage."""
    rules = (line.split() for line in gitattributes.splitlines() if line.strip() and not line.startswith("#"))
    return any("filter=lfs" in rule[1:] and pattern_matches(rule[0], path) for rule in rules)


def is_ignored(gitignore: str, path: str) -> bool:
    """Whether `.gitignore` leaves `path` out; later lines win."""
    ignored = False
    for line in (line.strip() for line in gitignore.splitlines()):
        if line and not line.startswith("#") and pattern_matches(line.lstrip("!"), path):
            ignored = not line.startswith("!")
    return ignored


RELATIONS = ("adapter", "finetune", "merge", "quantized")


def read_metadata(readme: str) -> dict[str, Any]:
    """The YAML block of a card; empty if there is none.

    Raises:
        ValueError: if the block is not a mapping in YAML.
    """
    lines = readme.lstrip("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---" or "---" not in [line.rstrip() for line in lines[1:]]:
        return {}
    end = [line.rstrip() for line in lines].index("---", 1)
    try:
        metadata = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        raise ValueError(f"YAML is not readable: {error}") from error
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError("YAML must be an object")
    return metadata


def find_errors(metadata: Mapping[str, Any]) -> list[str]:
    """What the Hub would not accept: values of the wrong type, and a `model-index` of the wrong shape."""
    errors = [
        f'"{key}" must be a string'
        for key in ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation")
        if not isinstance(metadata.get(key, ""), str)
    ]
    errors += [
        f'"{key}" must be a string or an array of strings'
        for key in ("base_model", "datasets", "language", "license", "metrics")
        if not all(isinstance(value, str) for value in as_list(metadata.get(key)))
    ]
    if not isinstance(metadata.get("tags", []), list) or not all(
        isinstance(tag, str) for tag in as_list(metadata.get("tags"))
    ):
        errors.append('"tags" must be an array of strings')
    if metadata.get("base_model_relation", "adapter") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {", ".join(RELATIONS)}')
    if "model-index" in metadata:
        errors += _errors_of_model_index(metadata["model-index"])
    return errors


def _errors_of_model_index(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or "results" not in model:
            errors.append(f'"model-index[{i}]" must have "name" and "results"')
            continue
        for j, result in enumerate(model["results"] or []):
            place = f"model-index[{i}].results[{j}]"
            required = {"task": ("type",), "dataset": ("type", "name")}
            for part, keys in required.items():
                found = result.get(part)
                errors += [
                    f'"{place}.{part}.{key}" is required'
                    for key in keys
                    if not isinstance(found, dict) or not isinstance(found.get(key), str)
                ]
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{place}.metrics" must be an array of at least one')
                continue
            errors += [
                f'"{place}.metrics[{k}]" must have "type" and "value"'
                for k, metric in enumerate(metrics)
                if not isinstance(metric, dict) or not isinstance(metric.get("type"), str) or "value" not in metric
            ]
    return errors


def tags_of(metadata: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The tags by which a repository is found: those of the card, and those that follow from it and its files."""
    paths = list(paths)
    tags = [str(metadata[key]) for key in ("library_name", "pipeline_tag") if metadata.get(key)]
    tags += [end for end in ("safetensors", "gguf") if any(path.endswith(f".{end}") for path in paths)]
    tags += [str(tag) for tag in as_list(metadata.get("tags"))]
    tags += [str(language) for language in as_list(metadata.get("language"))]
    tags += [f"dataset:{dataset}" for dataset in as_list(metadata.get("datasets"))]
    relation = metadata.get("base_model_relation") or ("adapter" if "adapter_config.json" in paths else "finetune")
    for base in as_list(metadata.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    for key, prefix in (
        ("license", "license"),
        ("task_categories", "task_categories"),
        ("size_categories", "size_categories"),
    ):
        tags += [f"{prefix}:{value}" for value in as_list(metadata.get(key))]
    return [*dict.fromkeys(tags), "region:us"]


def as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
