import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import HfHubHTTPError


def add(api, path: str, content: bytes, **where) -> object:
    return api.create_commit("alice/a", [CommitOperationAdd(path, content)], commit_message=f"add {path}", **where)


@pytest.fixture
def api(hub_api):
    hub_api.create_repo("alice/a")
    add(hub_api, "a.txt", b"old")
    return hub_api


def test_a_commit_as_a_pull_request_opens_a_discussion(hub, api):
    proposed = add(api, "b.txt", b"b", commit_description="because", create_pr=True)

    details = api.get_discussion_details("alice/a", proposed.pr_num)

    assert proposed.pr_url == f"{hub.endpoint}/alice/a/discussions/1"
    assert (details.title, details.status, details.author, details.is_pull_request) == (
        "add b.txt",
        "open",
        "alice",
        True,
    )
    assert (details.events[0].content, details.git_reference) == ("because", "refs/pr/1")


def test_discussions_are_listed_by_kind_and_status(api):
    api.create_discussion("alice/a", "A question", description="Why?")
    api.create_pull_request("alice/a", "A proposal")
    api.change_discussion_status("alice/a", 1, new_status="closed")

    def numbers(**wanted) -> list[int]:
        return [discussion.num for discussion in api.get_repo_discussions("alice/a", **wanted)]

    assert numbers() == [2, 1]
    assert numbers(discussion_type="pull_request") == [2]
    assert numbers(discussion_status="closed") == [1]
    assert numbers(author="bob") == []
    assert api.get_discussion_details("alice/a", 2).status == "draft"


def test_many_discussions_come_in_pages(api):
    for number in range(12):
        api.create_discussion("alice/a", f"Question {number}")

    assert len(list(api.get_repo_discussions("alice/a"))) == 12


def test_merging_brings_the_changes_and_keeps_what_happened_meanwhile(hub, api):
    api.create_commit(
        "alice/a",
        [CommitOperationAdd("b.txt", b"b"), CommitOperationDelete("a.txt")],
        commit_message="proposal",
        create_pr=True,
    )
    add(api, "meanwhile.txt", b"m")

    api.merge_pull_request("alice/a", 1)

    files = hub.files("alice/a")
    assert (files["b.txt"], files["meanwhile.txt"], "a.txt" in files) == (b"b", b"m", False)
    details = api.get_discussion_details("alice/a", 1)
    assert (details.status, details.merge_commit_oid) == ("merged", hub.head("alice/a"))


def test_a_pull_request_that_is_in_conflict_is_not_merged(hub, api):
    add(api, "a.txt", b"proposed", create_pr=True)
    add(api, "a.txt", b"meanwhile")

    assert api.get_discussion_details("alice/a", 1).conflicting_files == ["a.txt"]
    with pytest.raises(HfHubHTTPError, match="Both sides have changed a.txt"):
        api.merge_pull_request("alice/a", 1)
    assert hub.files("alice/a")["a.txt"] == b"meanwhile"


def test_only_an_open_pull_request_is_merged(api):
    api.create_discussion("alice/a", "A question")
    add(api, "b.txt", b"b", create_pr=True)
    api.merge_pull_request("alice/a", 2)

    for num in (1, 2):
        with pytest.raises(HfHubHTTPError, match="not an open pull request"):
            api.merge_pull_request("alice/a", num)
    with pytest.raises(HfHubHTTPError, match="does not exist"):
        api.get_discussion_details("alice/a", 3)
