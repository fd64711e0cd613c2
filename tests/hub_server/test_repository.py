import subprocess
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .repository import (
    Blob,
    Commit,
    Repo,
    find_errors,
    git_oid,
    is_ignored,
    is_large_file,
    pattern_matches,
    read_metadata,
    tags_of,
    tree_oids,
)


FILES = {
    "README.md": b"hello\n",
    "a/b/c.txt": b"deep",
    "a/b.txt": b"",
    "a.txt": b"sorts before the folder",
    "a0": b"after",
}


def git(folder: Path, *args: str) -> str:
    return subprocess.run(["git", *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_ids_are_those_that_git_gives(tmp_path):
    git(tmp_path, "init", "--quiet")
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    git(tmp_path, "add", "--all")
    root = git(tmp_path, "write-tree")

    oids = tree_oids({path: Blob.regular(content) for path, content in FILES.items()})

    assert oids[""] == root
    assert oids["a/b"] == git(tmp_path, "rev-parse", f"{root}:a/b")
    assert Blob.regular(FILES["README.md"]).oid == git(tmp_path, "hash-object", "README.md")


def test_a_large_file_has_the_id_of_its_pointer():
    sha256 = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 12345\n".encode()

    blob = Blob.large(sha256, 12345)

    assert (blob.oid, blob.etag) == (git_oid("blob", pointer), sha256)


def test_the_last_change_of_a_path_is_the_commit_that_changed_it():
    repo = Repo("alice/a", "model", private=False)
    first = Commit.make({"x/a": Blob.regular(b"1"), "y": Blob.regular(b"1")}, (), "first", "", "alice")
    second = Commit.make(first.files | {"y": Blob.regular(b"2")}, (first.oid,), "second", "", "alice")
    repo.commits = {commit.oid: commit for commit in (first, second)}

    changes = [repo.last_change(second, path).title for path in ("y", "x/a", "x")]

    assert changes == ["second", "first", "first"]


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*.bin", "a/b/model.bin", True),
        ("*.bin", "model.bin.txt", False),
        ("*tfevents*", "runs/events.tfevents.1", True),
        ("saved_model/**/*", "saved_model/a/b.txt", True),
        ("saved_model/**/*", "other/saved_model/a", False),
        ("logs/", "a/logs/x", True),
        ("logs/", "logs", False),
        ("/only_here", "only_here", True),
        ("/only_here", "a/only_here", False),
        ("a?c", "abc", True),
    ],
)
def test_patterns_mean_what_they_mean_to_git(pattern, path, matches):
    assert pattern_matches(pattern, path) is matches


def test_the_last_line_that_matches_decides_what_is_ignored():
    gitignore = "# comment\n*.log\n!keep.log\n"

    assert [path for path in ("a.log", "keep.log", "a.txt") if is_ignored(gitignore, path)] == ["a.log"]


def test_only_patterns_with_the_filter_send_files_to_the_large_file_storage():
    attributes = "*.txt text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"

    assert [path for path in ("a.txt", "a.bin") if is_large_file(attributes, path)] == ["a.bin"]


def test_a_card_without_metadata_has_none():
    assert read_metadata("# Title\n---\nnot: metadata\n---\n") == {}
    assert read_metadata("---\n---\n# Title") == {}


@pytest.mark.parametrize("block", ["a: [1", "- a list"])
def test_metadata_that_is_no_mapping_is_refused(block):
    with pytest.raises(ValueError, match="YAML"):
        read_metadata(f"---\n{block}\n---\n")


def test_what_the_library_writes_is_accepted():
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="peft",
        base_model="alice/base",
        model_name="erased",
        eval_results=[
            EvalResult("question-answering", "capitals", "Capitals", "accuracy", 0.25),
            EvalResult("text-generation", "text", "Text", "perplexity", 9.3),
        ],
    )

    assert find_errors(read_metadata(str(ModelCard(f"---\n{data}\n---\n# Title")))) == []


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"tags": "one"}, "tags"),
        ({"tags": [1]}, "tags"),
        ({"license": 2}, "license"),
        ({"library_name": ["peft"]}, "library_name"),
        ({"base_model": {"id": "x"}}, "base_model"),
        ({"base_model_relation": "child"}, "base_model_relation"),
        ({"model-index": {"name": "x"}}, "model-index"),
        ({"model-index": [{"name": "x"}]}, "results"),
        ({"model-index": [{"name": "x", "results": [{"metrics": [{"type": "a", "value": 1}]}]}]}, "task.type"),
        (
            {"model-index": [{"name": "x", "results": [{"task": {"type": "t"}, "dataset": {"type": "d"}}]}]},
            "dataset.name",
        ),
        ({"model-index": [{"name": "x", "results": [{"metrics": [{"type": "a"}]}]}]}, "value"),
        ({"model-index": [{"name": "x", "results": [{"metrics": []}]}]}, "metrics"),
    ],
)
def test_what_the_hub_would_refuse_is_named(metadata, named):
    assert any(named in error for error in find_errors(metadata))


def test_tags_follow_from_card_and_files():
    metadata = {
        "license": "mit",
        "library_name": "peft",
        "tags": ["elm-trainer"],
        "datasets": ["alice/pairs"],
        "base_model": "alice/base",
        "language": "en",
    }

    tags = tags_of(metadata, ["adapter_config.json", "adapter_model.safetensors"])

    assert tags[:4] == ["peft", "safetensors", "elm-trainer", "en"]
    assert {"license:mit", "dataset:alice/pairs", "base_model:alice/base", "base_model:adapter:alice/base"} < set(tags)
