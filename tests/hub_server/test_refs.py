import pytest
from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError


@pytest.fixture
def repo(hub_api) -> str:
    hub_api.create_repo("alice/a")
    hub_api.create_commit("alice/a", [CommitOperationAdd("a.txt", b"1")], commit_message="first")
    return "alice/a"


def add(api, repo: str, content: bytes, **where) -> None:
    api.create_commit(repo, [CommitOperationAdd("a.txt", content)], commit_message=content.decode(), **where)


def test_a_branch_moves_on_its_own(hub, hub_api, repo):
    first = hub.head(repo)
    hub_api.create_branch(repo, branch="try/this")
    add(hub_api, repo, b"2", revision="try/this")

    assert (hub.head(repo), hub.files(repo, "try/this")["a.txt"]) == (first, b"2")


def test_a_branch_may_start_anywhere(hub, hub_api, repo):
    initial = hub.commits(repo)[-1].oid

    hub_api.create_branch(repo, branch="empty", revision=initial)

    assert hub.head(repo, "empty") == initial
    with pytest.raises(RevisionNotFoundError):
        hub_api.create_branch(repo, branch="b", revision="nowhere")


def test_a_tag_stays_where_it_is(hub, hub_api, repo):
    first = hub.head(repo)
    hub_api.create_tag(repo, tag="v1", tag_message="first version")
    add(hub_api, repo, b"2")
    hub_api.create_tag(repo, tag="v0", revision=hub.commits(repo)[-1].oid)

    assert hub.head(repo, "v1") == first
    assert [commit.title for commit in hub.commits(repo, "v0")] == ["initial commit"]


@pytest.mark.parametrize("create", ["create_tag", "create_branch"])
def test_a_ref_that_exists_is_a_conflict_unless_that_is_fine(hub_api, repo, create):
    name = {"create_tag": "tag", "create_branch": "branch"}[create]
    getattr(hub_api, create)(repo, **{name: "x"})

    with pytest.raises(HfHubHTTPError, match="already exists") as caught:
        getattr(hub_api, create)(repo, **{name: "x"})

    assert caught.value.response.status_code == 409
    getattr(hub_api, create)(repo, **{name: "x"}, exist_ok=True)


def test_refs_are_listed_by_kind(hub, hub_api, repo):
    head = hub.head(repo)
    hub_api.create_branch(repo, branch="b")
    hub_api.create_tag(repo, tag="v1")
    proposed = hub_api.create_commit(repo, [CommitOperationAdd("p", b"p")], commit_message="proposal", create_pr=True)

    refs = hub_api.list_repo_refs(repo, include_pull_requests=True)

    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.branches] == [
        ("main", "refs/heads/main", head),
        ("b", "refs/heads/b", head),
    ]
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.tags] == [("v1", "refs/tags/v1", head)]
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", proposed.oid)]
    assert hub_api.list_repo_refs(repo).pull_requests is None


def test_refs_can_be_deleted_but_not_main(hub, hub_api, repo):
    hub_api.create_branch(repo, branch="b")
    hub_api.create_tag(repo, tag="v1")

    hub_api.delete_branch(repo, branch="b")
    hub_api.delete_tag(repo, tag="v1")

    assert list(hub.repo(repo).refs) == ["refs/heads/main"]
    with pytest.raises(RevisionNotFoundError):
        hub_api.delete_tag(repo, tag="v1")
    with pytest.raises(HfHubHTTPError, match="main branch"):
        hub_api.delete_branch(repo, branch="main")


def test_the_history_comes_in_pages_last_first(hub, hub_api, repo):
    hub.state.page_size = 2
    for content in (b"2", b"3"):
        add(hub_api, repo, content)

    assert [commit.title for commit in hub_api.list_repo_commits(repo)] == ["3", "2", "first", "initial commit"]
