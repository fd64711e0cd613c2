"""Commits, and the large files that go up before them."""

import json
import socket
import threading
from urllib.parse import urlsplit

import pytest
from httpx2 import Response
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import BadRequestError, EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import get_session

from . import ALICE, Answer, Cut, Damage, Fault, HubServer


FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "weights.safetensors": b"\x00\x01",
    "folder/a.txt": b"a",
    "folder/b.txt": b"b",
}

HEADER = {"key": "header", "value": {"summary": "m", "description": ""}}


@pytest.fixture
def repo(hub_api) -> str:
    hub_api.create_repo("alice/a")
    hub_api.create_commit("alice/a", additions(FILES), commit_message="first", commit_description="why")
    return "alice/a"


def additions(files: dict[str, bytes]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def commit_lines(hub, lines: list) -> Response:
    """Commit without the client."""
    return get_session().post(
        f"{hub.endpoint}/api/models/alice/a/commit/main",
        content="".join(json.dumps(line) + "\n" for line in lines).encode(),
        headers={"Authorization": f"Bearer {ALICE}"},
    )


def contents(hub, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {path: content for path, content in hub.files(repo, revision).items() if path != ".gitattributes"}


def test_a_commit_holds_the_files_the_message_and_the_author(hub, hub_api, repo):
    commit = hub.commits(repo)[0]

    assert contents(hub, repo) == FILES
    assert (commit.title, commit.message, commit.author) == ("first", "why", "alice")
    assert [info.title for info in hub_api.list_repo_commits(repo)] == ["first", "initial commit"]


def test_a_commit_can_add_change_and_delete_at_once(hub, hub_api, repo):
    done = hub_api.create_commit(
        repo,
        [
            CommitOperationDelete("folder/"),
            CommitOperationDelete("weights.safetensors"),
            *additions({"new.txt": b"new", "README.md": b"---\nlicense: other\n---\n"}),
        ],
        commit_message="second",
    )

    assert contents(hub, repo) == {"new.txt": b"new", "README.md": b"---\nlicense: other\n---\n"}
    assert (done.oid, done.commit_url) == (hub.head(repo), f"{hub.endpoint}/alice/a/commit/{hub.head(repo)}")
    assert contents(hub, repo, hub.commits(repo)[1].oid) == FILES  # the old state is still there


def test_files_that_did_not_change_make_no_commit(hub, hub_api, repo):
    before = hub.head(repo)

    done = hub_api.create_commit(repo, additions(FILES), commit_message="again")

    assert done.oid == before == hub.head(repo)


def test_a_commit_that_fails_in_part_changes_nothing(hub, hub_api, repo):
    before = hub.head(repo)
    operations = [*additions({"new.txt": b"new"}), CommitOperationDelete("missing.txt")]

    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        hub_api.create_commit(repo, operations, commit_message="m")

    assert hub.head(repo) == before


def test_a_commit_on_an_older_parent_is_refused(hub, hub_api, repo):
    old = hub.head(repo)
    hub_api.create_commit(repo, additions({"other.txt": b"other"}), commit_message="somebody else", parent_commit=old)

    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        hub_api.create_commit(repo, additions({"mine.txt": b"mine"}), commit_message="mine", parent_commit=old[:7])

    assert caught.value.response.status_code == 412
    assert "mine.txt" not in hub.files(repo)


def test_of_commits_with_the_same_parent_exactly_one_wins(hub, hub_api, repo):
    parent, outcomes = hub.head(repo), {}
    together = threading.Barrier(4)

    def race(name: str) -> None:
        api = HfApi(endpoint=hub.endpoint, token=ALICE)
        together.wait()
        try:
            outcomes[name] = api.create_commit(
                repo, additions({name: name.encode()}), commit_message=name, parent_commit=parent
            ).oid
        except HfHubHTTPError as error:
            outcomes[name] = error.response.status_code

    threads = [threading.Thread(target=race, args=(f"{number}.txt",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (winner,) = [name for name, outcome in outcomes.items() if outcome != 412]
    assert outcomes[winner] == hub.head(repo)
    assert contents(hub, repo) == FILES | {winner: winner.encode()}


def test_a_pull_request_starts_from_the_given_parent(hub, hub_api, repo):
    old = hub.head(repo)
    hub_api.create_commit(repo, additions({"other.txt": b"other"}), commit_message="somebody else")

    proposed = hub_api.create_commit(
        repo, additions({"mine.txt": b"mine"}), commit_message="mine", parent_commit=old, create_pr=True
    )

    assert (proposed.pr_num, proposed.pr_revision) == (1, "refs/pr/1")
    assert contents(hub, repo, "refs/pr/1") == FILES | {"mine.txt": b"mine"}
    assert hub.commits(repo, "refs/pr/1")[1].oid == old


def test_a_pull_request_takes_further_commits(hub, hub_api, repo):
    proposed = hub_api.create_commit(repo, additions({"1.txt": b"1"}), commit_message="one", create_pr=True)

    hub_api.create_commit(repo, additions({"2.txt": b"2"}), commit_message="two", revision=proposed.pr_revision)

    assert contents(hub, repo, "refs/pr/1") == FILES | {"1.txt": b"1", "2.txt": b"2"}
    assert hub.repo(repo).pulls == 1


def test_commits_go_to_branches_only(hub, hub_api, repo):
    hub_api.create_tag(repo, tag="v1")

    with pytest.raises(RevisionNotFoundError):
        hub_api.create_commit(repo, additions({"a": b"a"}), commit_message="m", revision="nowhere")
    with pytest.raises(BadRequestError, match="tag"):
        hub_api.create_commit(repo, additions({"a": b"a"}), commit_message="m", revision="v1")


def test_ignored_files_stay_away(hub, hub_api, repo):
    hub_api.create_commit(
        repo, additions({".gitignore": b"*.log\n", "run.log": b"log", "run.txt": b"txt"}), commit_message="m"
    )
    hub_api.create_commit(repo, additions({"later.log": b"log", "later.txt": b"txt"}), commit_message="m")

    assert {"run.log", "later.log"}.isdisjoint(hub.files(repo))
    assert {"run.txt", "later.txt"} < set(hub.files(repo))


def test_a_path_is_not_a_file_and_a_folder(hub, hub_api, repo):
    with pytest.raises(BadRequestError, match="files and folders at once: folder"):
        hub_api.create_commit(repo, additions({"folder": b"a file"}), commit_message="m")


@pytest.mark.parametrize("path", ["a/../../b", "/etc/passwd", ".git/config", "a//b", ""])
def test_paths_that_lead_elsewhere_are_refused(hub, hub_api, repo, path):
    operation = CommitOperationAdd("harmless.txt", b"x")
    operation.path_in_repo = path  # the client itself would not let these through

    with pytest.raises(BadRequestError, match="Invalid path"):
        hub_api.create_commit(repo, [operation], commit_message="m")


@pytest.mark.parametrize(
    ("lines", "status", "named"),
    [
        ([], 400, "not readable"),
        (["not an object"], 400, "not readable"),
        ([{"key": "file", "value": {"path": "a", "content": ""}}], 400, "the first line is not the header"),
        ([HEADER, {"key": "rename", "value": {"path": "a"}}], 400, "Unknown operation: rename"),
        ([HEADER, {"key": "file", "value": {"path": "a", "content": "%", "encoding": "base64"}}], 400, "not base64"),
        ([HEADER, {"key": "deletedFolder", "value": {"path": "nowhere"}}], 404, "A folder with this name"),
        ([HEADER, {"key": "file", "value": {"path": "README.md", "content": "---\ntags: a\n---\n"}}], 400, "tags"),
        ([HEADER, {"key": "file", "value": {"path": "README.md", "content": "---\n- a\n---\n"}}], 400, "YAML"),
        ([HEADER, {"key": "file", "value": {"path": "a", "content": "a" * (10 * 2**20 + 1)}}], 400, "larger than 10"),
    ],
)
def test_what_the_client_would_not_send_is_refused_too(hub, repo, lines, status, named):
    before = hub.head(repo)

    response = commit_lines(hub, lines)

    assert (response.status_code, named in response.json()["error"]) == (status, True)
    assert hub.head(repo) == before


PART = 1000


@pytest.fixture
def small_parts(hub, hub_api) -> HubServer:
    """The Hub, with files going up in parts of 1000 bytes from 3000 bytes on."""
    hub.state.multipart_from, hub.state.part_size = 3 * PART, PART
    hub_api.create_repo("alice/a")
    return hub


def add(api: HfApi, path: str, content: bytes) -> None:
    api.create_commit("alice/a", additions({path: content}), commit_message=f"add {path}")


def asked(hub: HubServer, method: str, path: str) -> int:
    return sum(seen.method == method and path in seen.path for seen in hub.requests)


@pytest.mark.parametrize(
    ("path", "content", "large"),
    [
        ("weights.safetensors", b"text", True),  # by name
        ("picture.png", b"\x89PNG\x00\xff", True),  # by content
        ("notes.txt", "é".encode() * 300, False),  # a character is cut at the end of the sample
        ("latin1.txt", b"caf\xe9 au lait", True),  # not UTF-8
        ("empty.bin", b"", False),
        ("long.txt", b"a" * (10 * 1024 * 1024 + 1), True),  # by size
    ],
)
def test_name_content_and_size_decide_what_is_a_large_file(hub, hub_api, path, content, large):
    hub_api.create_repo("alice/a")

    add(hub_api, path, content)

    assert hub.files("alice/a")[path] == content
    assert (hub.commits("alice/a")[0].files[path].sha256 is not None) is large


def test_git_attributes_learn_about_other_large_files(hub, hub_api):
    hub_api.create_repo("alice/a")

    add(hub_api, "pictures/report.png", b"\x89PNG\x00\xff")
    add(hub_api, "weights.safetensors", b"text")

    lines = hub.files("alice/a")[".gitattributes"].decode().splitlines()
    assert lines[-1] == "pictures/report.png filter=lfs diff=lfs merge=lfs -text"


def test_a_small_large_file_goes_up_as_a_whole(small_parts, hub_api):
    add(hub_api, "a.bin", b"x" * (3 * PART - 1))

    assert (asked(small_parts, "PUT", "/uploads/"), asked(small_parts, "POST", "/api/complete_multipart/")) == (1, 0)
    assert asked(small_parts, "POST", "/objects/verify/") == 1


def test_a_large_large_file_goes_up_in_parts(small_parts, hub_api):
    content = bytes(range(250)) * 17  # five parts, the last one shorter

    add(hub_api, "a.bin", content)

    assert (asked(small_parts, "PUT", "/uploads/"), asked(small_parts, "POST", "/api/complete_multipart/")) == (5, 1)
    assert small_parts.files("alice/a")["a.bin"] == content


def test_what_is_there_is_not_sent_again(small_parts, hub_api):
    add(hub_api, "a.bin", b"same")
    add(hub_api, "b.bin", b"same")

    assert asked(small_parts, "PUT", "/uploads/") == 1
    assert small_parts.files("alice/a")["b.bin"] == b"same"


def test_what_another_repository_has_must_be_sent(small_parts, hub_api):
    hub_api.create_repo("alice/b")
    add(hub_api, "a.bin", b"same")

    hub_api.create_commit("alice/b", [CommitOperationAdd("b.bin", b"same")], commit_message="m")

    assert asked(small_parts, "PUT", "/uploads/") == 2


@pytest.mark.parametrize("size", [PART, 5 * PART])
def test_a_file_that_was_stored_wrong_is_noticed_and_never_committed(small_parts, hub_api, size):
    small_parts.fail(Fault("PUT", "/uploads/", Damage()))

    with pytest.raises(RuntimeError, match="Error while uploading 'a.bin'") as caught:
        add(hub_api, "a.bin", b"x" * size)

    assert "wrong size or SHA-256" in str(caught.value.__cause__)
    assert len(small_parts.commits("alice/a")) == 1
    add(hub_api, "a.bin", b"x" * size)
    assert small_parts.files("alice/a")["a.bin"] == b"x" * size


@pytest.mark.parametrize("address", ["/api/complete_multipart/", "/objects/verify/", "/uploads/.*/2$"])
def test_a_step_whose_answer_was_lost_can_be_repeated(small_parts, hub_api, client_waits, address):
    small_parts.fail(Fault("*", address, Cut("answer")))
    content = bytes(range(250)) * 17

    add(hub_api, "a.bin", content)

    assert (small_parts.files("alice/a")["a.bin"], client_waits) == (content, [1])


def test_an_upload_that_was_given_up_leaves_nothing(small_parts, hub_api):
    small_parts.fail(Fault("PUT", "/uploads/", Answer(400)))
    with pytest.raises(RuntimeError):
        add(hub_api, "a.bin", b"content")
    upload = next(seen for seen in small_parts.requests if seen.method == "PUT")
    storage = urlsplit(small_parts.storage_endpoint)

    with socket.create_connection((storage.hostname, storage.port)) as connection:
        connection.sendall(f"PUT {upload.path}?{upload.query} HTTP/1.1\r\nContent-Length: 7\r\n\r\ncon".encode())
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(100)

    verified = get_session().post(
        f"{small_parts.endpoint}/alice/a.git/info/lfs/objects/verify/{upload.path.rpartition('/')[2]}",
        headers={"Authorization": f"Bearer {ALICE}"},
    )
    assert (answer, verified.status_code) == (b"", 404)
    assert "was not uploaded" in verified.json()["error"]


def test_parts_that_were_not_uploaded_do_not_make_a_file(small_parts, hub_api):
    small_parts.fail(Fault("POST", "/api/complete_multipart/", Answer(400)))
    with pytest.raises(RuntimeError):
        add(hub_api, "a.bin", b"x" * 4 * PART)
    asked_for = next(seen for seen in small_parts.requests if "complete_multipart" in seen.path)

    response = get_session().post(
        f"{small_parts.endpoint}{asked_for.path}?{asked_for.query}",
        json={"oid": "", "parts": [{"partNumber": 1, "etag": "0"}]},
    )

    assert (response.status_code, "not those that were uploaded" in response.json()["error"]) == (400, True)


def test_a_commit_cannot_point_to_a_file_that_was_not_uploaded(small_parts, hub_api):
    operation = CommitOperationAdd("a.bin", b"never sent")
    operation._upload_mode, operation._is_uploaded = "lfs", True

    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        hub_api.create_commit("alice/a", [operation], commit_message="m")


def test_the_storage_takes_and_gives_only_what_the_hub_signed(small_parts, hub_api):
    add(hub_api, "a.bin", b"content")
    sha256 = small_parts.commits("alice/a")[0].files["a.bin"].sha256
    address = f"{small_parts.storage_endpoint}/objects/{sha256}"
    location = get_session().head(f"{small_parts.endpoint}/alice/a/resolve/main/a.bin", follow_redirects=False)
    signed = location.headers["Location"]

    unsigned = get_session().get(address)
    with_token = get_session().get(signed, headers={"Authorization": f"Bearer {ALICE}"})

    assert (unsigned.status_code, with_token.status_code) == (403, 400)
    assert get_session().get(signed).content == b"content"
