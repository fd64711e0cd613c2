import hashlib
import time

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from . import ALICE, Answer, Call, Corrupt, Cut, Damage, Fault, HubServer, Slow, Truncate


LARGE = bytes(range(256)) * 40


@pytest.fixture
def repo(hub_api) -> str:
    hub_api.create_repo("alice/a")
    hub_api.create_commit("alice/a", [CommitOperationAdd("a.bin", LARGE)], commit_message="first")
    return "alice/a"


def add(api: HfApi, path: str = "b.bin", content: bytes = b"\0new", **where) -> object:
    return api.create_commit("alice/a", [CommitOperationAdd(path, content)], commit_message="second", **where)


def statuses(hub, method: str, path: str) -> list[int | None]:
    return [seen.status for seen in hub.requests if seen.method == method and path in seen.path]


def download(api: HfApi, repo: str) -> bytes:
    with open(api.hf_hub_download(repo, "a.bin", force_download=True), "rb") as file:
        return file.read()


@pytest.mark.parametrize("status", [401, 403, 409, 412, 429, 500, 503])
def test_a_status_is_answered_once_and_nothing_is_done(hub, hub_api, repo, status):
    before = hub.head(repo)
    hub.fail(Fault("POST", "/commit/", Answer(status, message="not today")))

    with pytest.raises(HfHubHTTPError, match="not today") as caught:
        add(hub_api)

    assert (caught.value.response.status_code, hub.head(repo)) == (status, before)
    add(hub_api)
    assert hub.files(repo)["b.bin"] == b"\0new"


@pytest.mark.parametrize(
    ("headers", "waits"),
    [
        ({}, [1, 2, 4]),
        ({"Retry-After": "7"}, [8, 8, 8]),
        ({"RateLimit": '"api";r=0;t=5', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, [6, 6, 6]),
    ],
)
def test_the_client_waits_as_long_as_it_is_told(hub, hub_api, repo, client_waits, headers, waits):
    hub.fail(Fault("PUT", "/uploads/", Answer(429, headers), times=3))

    add(hub_api)

    assert client_waits == waits
    assert statuses(hub, "PUT", "/uploads/")[1:] == [429, 429, 429, 200]


@pytest.mark.parametrize("when", ["before", "request", "answer"])
def test_an_upload_that_was_cut_is_sent_again(hub, hub_api, repo, client_waits, when):
    hub.fail(Fault("PUT", "/uploads/", Cut(when)))

    add(hub_api, content=b"\0" * 5_000_000)

    assert hub.files(repo)["b.bin"] == b"\0" * 5_000_000
    assert (statuses(hub, "PUT", "/uploads/")[1:], client_waits) == ([None, 200], [1])


@pytest.mark.parametrize(("when", "committed"), [("before", False), ("request", False), ("answer", True)])
def test_a_commit_that_was_cut_is_there_whole_or_not_at_all(hub, hub_api, repo, when, committed):
    before = hub.head(repo)
    hub.fail(Fault("POST", "/commit/", Cut(when)))

    with pytest.raises(httpx2.TransportError):
        add(hub_api)

    assert hub.files(repo).get("b.bin") == (b"\0new" if committed else None)
    assert (hub.head(repo) != before) is committed


@pytest.mark.parametrize(("patience", "asked"), [(5, [302]), (0.1, [302, 302])])
def test_a_slow_hub_is_waited_for_or_asked_again(hub, hub_api, repo, patience, asked):
    hub.fail(Fault("HEAD", "/resolve/", Slow(0.3)))
    began = time.monotonic()

    hub_api.hf_hub_download(repo, "a.bin", etag_timeout=patience)

    assert (time.monotonic() - began > 0.3) is (patience == 5)
    while None in statuses(hub, "HEAD", "/resolve/"):  # the first answer is still on its way
        time.sleep(0.01)
    assert statuses(hub, "HEAD", "/resolve/") == asked


def test_a_slow_storage_drips(hub, hub_api, repo):
    hub.fail(Fault("GET", "/objects/", Slow(0.02, drip=1024)))
    began = time.monotonic()

    content = download(hub_api, repo)

    assert (content == LARGE, time.monotonic() - began > 0.15) == (True, True)


def test_a_truncated_download_is_fetched_again(hub, hub_api, repo, client_waits):
    hub.fail(Fault("GET", "/objects/", Truncate(100)))

    assert download(hub_api, repo) == LARGE
    assert client_waits == [1]


def test_a_shorter_file_in_the_storage_is_noticed(hub, hub_api, repo):
    hub.fail(Fault("GET", "/objects/", Truncate(100, consistent=True)))

    with pytest.raises(OSError, match="should be of size 10240 but has size 100"):
        download(hub_api, repo)


def test_a_corrupt_download_has_the_right_length_and_the_wrong_hash(hub, hub_api, repo):
    hub.fail(Fault("GET", "/objects/", Corrupt(place=5000)))

    content = download(hub_api, repo)  # the client does not look at the hash

    assert len(content) == len(LARGE)
    assert [place for place, (one, two) in enumerate(zip(content, LARGE, strict=True)) if one != two] == [5000]
    assert hashlib.sha256(content).hexdigest() != hub.commits(repo)[0].files["a.bin"].sha256


def test_a_damaged_upload_is_noticed(hub, hub_api, repo):
    hub.fail(Fault("PUT", "/uploads/", Damage()))

    with pytest.raises(RuntimeError, match="Error while uploading 'b.bin'"):
        add(hub_api)

    assert statuses(hub, "POST", "/verify/")[-1] == 422


def test_a_hook_runs_before_the_request_is_handled(hub, hub_api, repo):
    parent = hub.head(repo)
    other = HfApi(endpoint=hub.endpoint, token=ALICE)
    hub.fail(Fault("POST", "/commit/", Call(lambda: add(other, "theirs.txt", b"theirs"))))

    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        add(hub_api, "mine.txt", b"mine", parent_commit=parent)

    assert (hub.files(repo)["theirs.txt"], "mine.txt" in hub.files(repo)) == (b"theirs", False)


def test_a_hook_that_fails_is_noticed(tmp_path):
    def fails() -> None:
        raise AssertionError("what the hook expected does not hold")

    with HubServer(tmp_path) as hub:
        hub.add_user("alice", ALICE)
        hub.fail(Fault("POST", "/repos/create", Call(fails)))

        with pytest.raises(HfHubHTTPError, match="broken"):
            HfApi(endpoint=hub.endpoint, token=ALICE).create_repo("alice/a")

        assert "what the hook expected does not hold" in hub.broken[0]


def test_a_fault_can_wait_for_a_later_request_and_meet_several(hub, hub_api, repo):
    hub.fail(Fault("GET", "/refs$", Answer(500), times=2, skip=1))
    met = []

    for _ in range(4):
        try:
            hub_api.list_repo_refs(repo)
            met.append(200)
        except HfHubHTTPError as error:
            met.append(error.response.status_code)

    assert met == [200, 500, 500, 200]


def test_a_fault_leaves_other_methods_and_paths_alone(hub, hub_api, repo):
    hub.fail(Fault("DELETE", "/refs$", Answer(500)))
    hub.fail(Fault("*", "/tag/", Answer(500)))

    hub_api.list_repo_refs(repo)

    with pytest.raises(HfHubHTTPError):
        hub_api.create_tag(repo, tag="v1")
