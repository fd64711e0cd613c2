from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from . import ALICE, Cut, Fault


LARGE = bytes(range(256)) * 40
FILES = {
    "config.json": b'{"a": 1}',
    "weights.safetensors": LARGE,
    "folder/ä ö?.txt": b"odd name",
    "folder/x/y.txt": b"",
}


@pytest.fixture(params=["model", "dataset"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def repo(hub_api, kind) -> str:
    hub_api.create_repo("alice/a", private=True, repo_type=kind)
    operations = [CommitOperationAdd(path, content) for path, content in FILES.items()]
    hub_api.create_commit("alice/a", operations, commit_message="first", repo_type=kind)
    return "alice/a"


def asked(hub, method: str) -> list[str]:
    return [seen.path for seen in hub.requests if seen.method == method]


def test_a_snapshot_holds_every_file(hub, hub_api, repo, kind):
    folder = Path(hub_api.snapshot_download(repo, repo_type=kind))

    assert folder.name == hub.head(repo, repo_type=kind)
    assert {path: (folder / path).read_bytes() for path in FILES} == FILES
    assert hub.files(repo, repo_type=kind) == FILES | {".gitattributes": (folder / ".gitattributes").read_bytes()}


def test_a_file_is_downloaded_once(hub, hub_api, repo, kind):
    first = hub_api.hf_hub_download(repo, "weights.safetensors", repo_type=kind)
    downloads = len(asked(hub, "GET"))
    second = hub_api.hf_hub_download(repo, "weights.safetensors", repo_type=kind)

    assert (first, len(asked(hub, "GET"))) == (second, downloads)
    assert Path(first).read_bytes() == LARGE


def test_a_file_that_changed_is_downloaded_again(hub, hub_api, repo, kind):
    hub_api.hf_hub_download(repo, "config.json", repo_type=kind)
    hub_api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=repo, repo_type=kind)

    assert Path(hub_api.hf_hub_download(repo, "config.json", repo_type=kind)).read_bytes() == b"{}"


def test_the_cache_serves_when_the_hub_is_not_asked(hub, hub_api, repo, kind):
    path = hub_api.hf_hub_download(repo, "config.json", repo_type=kind)
    requests = len(hub.requests)

    assert hub_api.hf_hub_download(repo, "config.json", repo_type=kind, local_files_only=True) == path
    with pytest.raises(LocalEntryNotFoundError):
        hub_api.hf_hub_download(repo, "weights.safetensors", repo_type=kind, local_files_only=True)
    assert len(hub.requests) == requests


@pytest.mark.parametrize("path", ["config.json", "weights.safetensors"])
def test_metadata_tell_commit_hash_and_size(hub, hub_api, repo, kind, path):
    metadata = hub_api.get_hf_file_metadata(
        url=hf_hub_url(repo, path, repo_type=kind, endpoint=hub.endpoint), token=ALICE
    )
    blob = hub.commits(repo, repo_type=kind)[0].files[path]

    assert (metadata.commit_hash, metadata.etag, metadata.size) == (
        hub.head(repo, repo_type=kind),
        blob.etag,
        len(FILES[path]),
    )
    assert metadata.xet_file_data is None
    assert metadata.location.startswith(hub.storage_endpoint if blob.sha256 else hub.endpoint)


def test_the_token_is_not_sent_to_the_storage(hub, hub_api, repo, kind):
    hub_api.hf_hub_download(repo, "weights.safetensors", repo_type=kind)

    assert [
        (seen.user, seen.status) for seen in hub.requests if seen.origin == "storage" and seen.method == "GET"
    ] == [(None, 200)]


def test_a_download_that_was_cut_goes_on_where_it_was(hub, hub_api, repo, kind, client_waits, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # the client keeps whole chunks only
    hub.fail(Fault("GET", "/objects/", Cut("content")))

    path = hub_api.hf_hub_download(repo, "weights.safetensors", repo_type=kind)

    assert Path(path).read_bytes() == LARGE
    downloads = [(seen.status, seen.sent) for seen in hub.requests if seen.path.startswith("/objects/")]
    assert downloads == [(200, len(LARGE) // 2), (206, len(LARGE) // 2)]


@pytest.mark.parametrize("path", ["config.json", "weights.safetensors"])
@pytest.mark.parametrize(
    ("asked_for", "status", "part"),
    [
        ("bytes=2-4", 206, slice(2, 5)),
        ("bytes=3-", 206, slice(3, None)),
        ("bytes=-3", 206, slice(-3, None)),
        ("bytes=2-1000000", 206, slice(2, None)),
        ("bytes=1000000-", 416, None),
        ("chapters=1-2", 200, slice(None)),
    ],
)
def test_ranges(hub, hub_api, path, asked_for, status, part):
    hub_api.create_repo("alice/b")
    hub_api.create_commit("alice/b", [CommitOperationAdd(path, FILES[path])], commit_message="m")

    response = get_session().get(f"{hub.endpoint}/alice/b/resolve/main/{path}", headers={"Range": asked_for})

    assert response.status_code == status
    assert response.content == (FILES[path][part] if part else b"")
    if status == 416:
        assert response.headers["Content-Range"] == f"bytes */{len(FILES[path])}"
    if status == 206:
        assert response.headers["Content-Range"].endswith(f"/{len(FILES[path])}")


def test_what_is_missing_is_named(hub, hub_api, repo, kind):
    with pytest.raises(EntryNotFoundError):
        hub_api.hf_hub_download(repo, "missing.txt", repo_type=kind)
    with pytest.raises(RevisionNotFoundError):
        hub_api.hf_hub_download(repo, "config.json", repo_type=kind, revision="nowhere")
    with pytest.raises(RepositoryNotFoundError):
        hub_api.hf_hub_download("alice/nothing", "config.json", repo_type=kind)
    with pytest.raises(RepositoryNotFoundError):
        hub_api.hf_hub_download(repo, "config.json", repo_type=kind, token=False)


def test_a_file_known_to_be_missing_is_remembered_with_its_commit(hub, hub_api, repo, kind):
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    assert not hub_api.file_exists(repo, "missing.txt", repo_type=kind)
    with pytest.raises(EntryNotFoundError):
        hub_api.hf_hub_download(repo, "missing.txt", repo_type=kind)

    assert try_to_load_from_cache(repo, "missing.txt", repo_type=kind) is _CACHED_NO_EXIST


def test_a_tree_lists_files_and_folders(hub, hub_api, repo, kind):
    top = {entry.path: entry for entry in hub_api.list_repo_tree(repo, repo_type=kind)}
    all_paths = [entry.path for entry in hub_api.list_repo_tree(repo, repo_type=kind, recursive=True)]
    inner = [entry.path for entry in hub_api.list_repo_tree(repo, "folder", repo_type=kind)]

    assert list(top) == [".gitattributes", "config.json", "folder", "weights.safetensors"]
    assert all_paths == sorted([*FILES, ".gitattributes", "folder", "folder/x"])
    assert inner == ["folder/x", "folder/ä ö?.txt"]
    assert (top["weights.safetensors"].lfs.size, top["config.json"].lfs) == (len(LARGE), None)
    with pytest.raises(EntryNotFoundError):
        list(hub_api.list_repo_tree(repo, "missing", repo_type=kind))


def test_a_tree_tells_the_last_commit_of_each_path_on_request(hub, hub_api, repo, kind):
    hub_api.upload_file(
        path_or_fileobj=b"{}", path_in_repo="folder/new.json", repo_id=repo, repo_type=kind, commit_message="second"
    )

    entries = hub_api.list_repo_tree(repo, repo_type=kind, recursive=True, expand=True)
    titles = {entry.path: entry.last_commit.title for entry in entries}

    assert titles["folder/new.json"] == titles["folder"] == "second"
    assert titles["config.json"] == titles["folder/x"] == "first"
    assert titles[".gitattributes"] == "initial commit"


def test_long_trees_come_in_pages(hub, hub_api, repo, kind):
    hub.state.page_size = 2

    paths = [entry.path for entry in hub_api.list_repo_tree(repo, repo_type=kind, recursive=True)]

    assert paths == sorted([*FILES, ".gitattributes", "folder", "folder/x"])
    assert sum("/tree/" in path for path in asked(hub, "GET")) == 4


def test_metadata_need_no_token_for_what_is_public(hub, hub_api):
    hub_api.create_repo("alice/b")
    url = hf_hub_url("alice/b", ".gitattributes", endpoint=hub.endpoint)

    assert get_hf_file_metadata(url, token=False).commit_hash == hub.head("alice/b")
