"""The Hub of the tests does what publishing and loading rely on, as the real one does."""

import hashlib
import re
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from tests.hub_server import ALICE, Answer, Call, Damage, Fault, HubServer


ROOT = Path(__file__).parents[2]
README = (ROOT / "tests" / "hub_server" / "README.md").read_text(encoding="utf-8")
FILES = {"README.md": b"---\nlicense: mit\n---\n", "weights.safetensors": b"\x00\x01", "folder/x/a.txt": b"a"}


@pytest.fixture
def repo(hub_api) -> str:
    hub_api.create_repo("alice/a")
    add(hub_api, FILES)
    return "alice/a"


def add(api: HfApi, files: dict[str, bytes], **options):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit("alice/a", operations, commit_message="add", **options)


def held(hub, revision="main") -> dict[str, bytes]:
    return {path: content for path, content in hub.files("alice/a", revision).items() if path != ".gitattributes"}


def test_the_readme_names_the_version_of_the_client_that_is_installed():
    assert re.findall(r"huggingface_hub (\d+\.\d+\.\d+)", README) == [huggingface_hub.__version__]


def test_the_example_of_the_readme_passes(hub, hub_api, client_waits):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    defined: dict = {}
    exec(example, defined)

    defined["test_a_server_error_is_retried"](hub, hub_api, client_waits)


def test_an_address_that_is_not_known_is_refused_and_recorded(tmp_path):
    with HubServer(tmp_path) as hub:
        with pytest.raises(HfHubHTTPError, match="does not know GET /api/spaces"):
            list(HfApi(endpoint=hub.endpoint, token=False).list_spaces())

        assert hub.unknown == ["GET /api/spaces"]


def test_what_goes_wrong_in_the_hub_itself_is_recorded(tmp_path):
    def fails() -> None:
        raise AssertionError("what the hook expected does not hold")

    with HubServer(tmp_path) as hub:
        hub.add_user("alice", ALICE)
        hub.fail(Fault("POST", "/repos/create", Call(fails)))

        with pytest.raises(HfHubHTTPError, match="broken"):
            HfApi(endpoint=hub.endpoint, token=ALICE).create_repo("alice/a")

        assert "what the hook expected does not hold" in hub.broken[0]


def test_files_have_the_ids_that_git_gives(hub, hub_api, repo, tmp_path):
    (tmp_path / "file").write_bytes(FILES["folder/x/a.txt"])
    oid = subprocess.run(["git", "hash-object", tmp_path / "file"], check=True, capture_output=True, text=True).stdout

    entries = {entry.path: entry for entry in hub_api.list_repo_tree(repo, recursive=True)}

    assert list(entries) == sorted([*FILES, ".gitattributes", "folder", "folder/x"])
    assert entries["folder/x/a.txt"].blob_id == oid.strip() and entries["folder/x/a.txt"].lfs is None
    assert entries["weights.safetensors"].lfs.sha256 == hashlib.sha256(b"\x00\x01").hexdigest()
    assert [entry.path for entry in hub_api.list_repo_tree(repo, "folder")] == ["folder/x"]


@pytest.mark.parametrize(
    ("path", "content", "large"),
    [
        ("weights.safetensors", b"text", True),  # by name
        ("picture.png", b"\x89PNG\x00\xff", True),  # by content
        ("notes.txt", "é".encode() * 300, False),  # a character is cut at the end of the sample
        ("empty.bin", b"", False),
        ("long.txt", b"a" * (10 * 1024 * 1024 + 1), True),  # by size
    ],
)
def test_name_content_and_size_decide_what_is_a_large_file(hub, hub_api, path, content, large):
    hub_api.create_repo("alice/a")

    add(hub_api, {path: content})

    assert hub.files("alice/a")[path] == content
    assert (hub.commits("alice/a")[0].files[path].sha256 is not None) is large
    assert (f"{path} filter=lfs".encode() in hub.files("alice/a")[".gitattributes"]) is (
        large and not path.endswith(".safetensors")
    )


def test_a_commit_changes_all_or_nothing(hub, hub_api, repo):
    before = hub.head(repo)
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("missing.txt")]

    with pytest.raises(EntryNotFoundError, match="There is no missing.txt"):
        hub_api.create_commit(repo, operations, commit_message="m")

    assert hub.head(repo) == before and held(hub) == FILES


def test_of_commits_with_the_same_parent_exactly_one_wins(hub, repo):
    parent, outcomes = hub.head(repo), {}
    together = threading.Barrier(4)

    def race(name: str) -> None:
        api = HfApi(endpoint=hub.endpoint, token=ALICE)
        together.wait()
        try:
            outcomes[name] = add(api, {name: name.encode()}, parent_commit=parent).oid
        except HfHubHTTPError as error:
            outcomes[name] = error.response.status_code

    threads = [threading.Thread(target=race, args=(f"{number}.txt",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (winner,) = [name for name, outcome in outcomes.items() if outcome != 412]
    assert outcomes[winner] == hub.head(repo)
    assert held(hub) == FILES | {winner: winner.encode()}


def test_a_pull_request_starts_from_the_given_parent(hub, hub_api, repo):
    old = hub.head(repo)
    add(hub_api, {"theirs.txt": b"theirs"})

    proposed = add(hub_api, {"mine.txt": b"mine"}, parent_commit=old, create_pr=True)

    assert proposed.pr_revision == "refs/pr/1"
    assert held(hub, "refs/pr/1") == FILES | {"mine.txt": b"mine"}
    assert held(hub) == FILES | {"theirs.txt": b"theirs"}


def test_a_commit_cannot_point_to_a_file_that_was_not_uploaded(hub_api, repo):
    operation = CommitOperationAdd("a.bin", b"never sent")
    operation._upload_mode, operation._is_uploaded = "lfs", True

    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        hub_api.create_commit(repo, [operation], commit_message="m")


@pytest.mark.parametrize("size", [1000, 2500])
def test_a_file_that_was_stored_wrong_is_noticed_and_never_committed(hub, hub_api, repo, size):
    hub.contents.multipart_from, hub.contents.part_size = 2000, 1000
    hub.fail(Fault("PUT", "/uploads/", Damage()))

    with pytest.raises(RuntimeError, match="Error while uploading 'a.bin'") as caught:
        add(hub_api, {"a.bin": b"x" * size})

    assert "wrong size or SHA-256" in str(caught.value.__cause__)
    assert held(hub) == FILES
    add(hub_api, {"a.bin": b"x" * size})
    assert held(hub)["a.bin"] == b"x" * size


def test_large_files_are_given_and_taken_only_where_the_address_is_signed(hub, repo):
    location = get_session().head(f"{hub.endpoint}/{repo}/resolve/main/weights.safetensors", follow_redirects=False)
    signed = location.headers["Location"]

    assert get_session().get(signed).content == FILES["weights.safetensors"]
    assert get_session().get(signed.partition("?")[0]).status_code == 403
    assert get_session().put(f"{hub.endpoint}/uploads/0", content=b"").status_code == 403


@pytest.mark.parametrize(
    ("asked_for", "status", "content"),
    [("bytes=2-4", 206, b"234"), ("bytes=7-", 206, b"789"), ("bytes=2-99", 206, b"23456789"), ("bytes=99-", 416, b"")],
)
def test_a_part_of_a_file_can_be_asked_for(hub, hub_api, asked_for, status, content):
    hub_api.create_repo("alice/a")
    add(hub_api, {"a.txt": b"0123456789"})

    response = get_session().get(f"{hub.endpoint}/alice/a/resolve/main/a.txt", headers={"Range": asked_for})

    assert (response.status_code, response.content) == (status, content)


def test_a_private_repository_is_not_found_by_strangers(hub, hub_api):
    hub.add_user("bob", "hf_bob")
    hub_api.create_repo("alice/secret", private=True)

    for token, status in (("hf_bob", 404), (False, 401)):
        with pytest.raises(RepositoryNotFoundError) as private:
            hub_api.model_info("alice/secret", token=token)
        assert private.value.response.status_code == status
    assert hub_api.model_info("alice/secret").private
    assert [model.id for model in hub_api.list_models(token="hf_bob")] == []
    with pytest.raises(HfHubHTTPError) as refused:
        hub_api.create_repo("alice/other", token="hf_bob")
    assert refused.value.response.status_code == 403


def test_what_is_missing_is_named(hub, hub_api, repo):
    with pytest.raises(EntryNotFoundError):
        hub_api.hf_hub_download(repo, "missing.txt")
    with pytest.raises(RevisionNotFoundError):
        hub_api.hf_hub_download(repo, "README.md", revision="nowhere")


@pytest.mark.parametrize("head", ["tags: one", "license: 2", "model-index: [{name: x, results: [{}]}]", "- a list"])
def test_a_card_that_the_hub_would_not_take_is_refused_before_anything_is_uploaded(hub, hub_api, repo, head):
    with pytest.raises(ValueError, match="Invalid metadata in README.md"):
        add(hub_api, {"README.md": f"---\n{head}\n---\n".encode()})

    assert held(hub) == FILES


def test_a_fault_can_wait_for_a_later_request_and_meet_several(hub, hub_api, repo):
    hub.fail(Fault("GET", "/refs$", Answer(500), times=2, skip=1))
    hub.fail(Fault("DELETE", "/refs$", Answer(403)))
    met = []

    for _ in range(4):
        try:
            hub_api.list_repo_refs(repo)
            met.append(200)
        except HfHubHTTPError as error:
            met.append(error.response.status_code)

    assert met == [200, 500, 500, 200]


def test_the_environment_of_another_process_leads_nowhere_else(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")

    env = hub.env(home=tmp_path)

    assert (env["HF_ENDPOINT"], env["HF_HOME"]) == (hub.endpoint, str(tmp_path))
    assert {"HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"}.isdisjoint(env)


def test_the_hub_runs_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    command = [sys.executable, "-m", "tests.hub_server", "--user", "carol:hf_carol"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as hub:
        try:
            assert hub.stderr
            last = "Repositories are kept in memory and are gone when this ends (Ctrl-C).\n"
            told = "".join(iter(hub.stderr.readline, last))
            address, token = re.findall(r"HF_ENDPOINT=(\S+) .* HF_TOKEN=(\S+)", told)[0]
            api = HfApi(endpoint=address, token=token)
            base, file = re.findall(r"--base_model (\S+) --gguf_file (\S+)\n", told)[0]
            assert api.file_exists(base, file) and api.model_info(base).card_data.license == "apache-2.0"
            api.create_repo("carol/a")
            api.create_commit("carol/a", [CommitOperationAdd("a.bin", b"\0")], commit_message="m")
            path = api.hf_hub_download("carol/a", "a.bin", cache_dir=tmp_path)
            shown = [hub.stderr.readline() for _ in range(6)]
        finally:
            hub.terminate()

    assert Path(path).read_bytes() == b"\0"
    assert any(line.startswith("200 POST /api/repos/create (carol, ") for line in shown)
