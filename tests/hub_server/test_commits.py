import json
import threading

import pytest
from httpx2 import Response
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import BadRequestError, EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.utils import get_session

from .fixtures import ALICE


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


def test_files_are_copied_without_being_sent_again(hub, hub_api, repo):
    copies = [CommitOperationCopy(path, f"copy/{path}") for path in ("weights.safetensors", "folder/a.txt")]

    hub_api.create_commit(repo, copies, commit_message="copy")

    assert contents(hub, repo) == FILES | {"copy/weights.safetensors": b"\x00\x01", "copy/folder/a.txt": b"a"}


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
    assert [discussion.num for discussion in hub_api.get_repo_discussions(repo)] == [1]


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


def test_text_may_be_sent_as_it_is(hub, repo):
    lines = [HEADER, {"key": "file", "value": {"path": "a.txt", "content": "ä", "encoding": "utf-8"}}]

    response = commit_lines(hub, lines)

    assert (response.status_code, hub.files(repo)["a.txt"]) == (200, "ä".encode())
