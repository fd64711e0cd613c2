"""Every address: who may do what, repositories, branches and tags, and the table of the README."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from . import HubServer
from .server import ROUTES, Seen


README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")


def route_of(seen: Seen) -> str:
    method = "GET" if seen.method == "HEAD" else seen.method
    fits = [
        route
        for route in ROUTES
        if (route.method, route.origin) == (method, seen.origin) and route.expression.fullmatch(seen.path)
    ]
    return f"{fits[0].method} {fits[0].path}"


def test_the_readme_lists_exactly_the_addresses_that_there_are():
    listed = re.findall(r"^\| (hub|storage) \| (\w+) \| `([^`]+)` \| (.+) \|$", README, flags=re.MULTILINE)

    assert listed == [(route.origin, route.method, route.path, route.purpose) for route in ROUTES]


def test_the_readme_names_the_version_of_the_client_that_is_pinned():
    (named,) = re.findall(r"huggingface_hub (\d+\.\d+\.\d+)", README)
    (pinned,) = re.findall(r"^huggingface_hub==(.+)$", CONSTRAINTS, flags=re.MULTILINE)

    assert named == pinned


def test_the_example_of_the_readme_passes(hub, hub_api, client_waits):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    defined: dict = {}
    exec(example, defined)

    defined["test_a_server_error_is_retried"](hub, hub_api, client_waits)

    assert hub.commits("alice/a")[0].title == "m"


def test_an_address_that_is_not_known_is_refused_and_recorded(tmp_path):
    with HubServer(tmp_path) as hub:
        api = huggingface_hub.HfApi(endpoint=hub.endpoint, token=False)

        with pytest.raises(HfHubHTTPError, match="does not know GET /api/spaces") as caught:
            list(api.list_spaces())

        assert (caught.value.response.status_code, hub.unknown) == (501, ["GET /api/spaces"])


def test_what_goes_wrong_in_the_hub_itself_is_recorded(tmp_path):
    with HubServer(tmp_path) as hub:
        hub.add_user("alice", "hf_alice")
        hub.state.repos = None  # type: ignore[assignment]

        with pytest.raises(HfHubHTTPError, match="broken") as caught:
            huggingface_hub.HfApi(endpoint=hub.endpoint, token="hf_alice").create_repo("alice/a")

        assert caught.value.response.status_code == 500
        assert "TypeError" in hub.broken[0]


@pytest.mark.filterwarnings("ignore:Warnings while validating")
def test_the_client_uses_every_address(hub, hub_api):
    hub.state.multipart_from, hub.state.part_size = 2000, 1000

    hub_api.whoami()
    hub_api.create_repo("alice/a")
    files = {"README.md": b"# A", "small.bin": b"small", "large.bin": b"x" * 2500, "folder/a.txt": b"a"}
    hub_api.create_commit("alice/a", [CommitOperationAdd(*file) for file in files.items()], commit_message="m")
    hub_api.model_info("alice/a")
    hub_api.model_info("alice/a", revision="main")
    list(hub_api.list_models())
    list(hub_api.list_repo_tree("alice/a", "folder"))
    hub_api.get_paths_info("alice/a", ["README.md"])
    hub_api.snapshot_download("alice/a")
    hub_api.list_repo_commits("alice/a")
    hub_api.create_branch("alice/a", branch="b")
    hub_api.create_tag("alice/a", tag="t")
    hub_api.list_repo_refs("alice/a")

    assert {route_of(seen) for seen in hub.requests} == {f"{route.method} {route.path}" for route in ROUTES}


def api_of(hub, name: str, **rights) -> HfApi:
    hub.add_user(name, f"hf_{name}", **rights)
    return HfApi(endpoint=hub.endpoint, token=f"hf_{name}")


def test_whoami_tells_name_organisations_and_role(hub):
    api = api_of(hub, "bob", can_write=False, orgs=["lab"])

    me = api.whoami()

    assert (me["name"], [org["name"] for org in me["orgs"]]) == ("bob", ["lab"])
    assert me["auth"]["accessToken"]["role"] == "read"


def test_an_unknown_token_is_refused(hub):
    api = HfApi(endpoint=hub.endpoint, token="hf_nobody")

    with pytest.raises(HfHubHTTPError, match="Invalid user token") as caught:
        api.whoami()
    assert caught.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        api.create_repo("alice/a")


@pytest.mark.parametrize("token", ["hf_bob", False])
def test_a_private_repository_is_not_found_by_strangers(hub, hub_api, token):
    api_of(hub, "bob")
    hub_api.create_repo("alice/secret", private=True)

    with pytest.raises(RepositoryNotFoundError) as private:
        hub_api.model_info("alice/secret", token=token)
    with pytest.raises(RepositoryNotFoundError) as missing:
        hub_api.model_info("alice/nothing", token=token)

    assert private.value.response.status_code == missing.value.response.status_code == (404 if token else 401)


def test_an_organisation_shares_its_private_repositories(hub):
    carol, bob = (api_of(hub, name, orgs=["lab"]) for name in ("carol", "bob"))
    carol.create_repo("lab/a", private=True)

    bob.create_commit("lab/a", [CommitOperationAdd("a.txt", b"a")], commit_message="by another member")

    assert hub.files("lab/a")["a.txt"] == b"a"


@pytest.mark.parametrize("rights", [{"can_write": False, "orgs": ["alice"]}, {"can_write": True}])
def test_without_the_right_to_write_nothing_can_be_changed(hub, hub_api, rights):
    hub_api.create_repo("alice/a")
    head = hub.head("alice/a")
    bob = api_of(hub, "bob", **rights)
    attempts = [
        lambda: bob.create_repo("alice/b"),
        lambda: bob.create_commit("alice/a", [CommitOperationAdd("a.txt", b"a")], commit_message="m"),
        lambda: bob.create_branch("alice/a", branch="b"),
        lambda: bob.create_tag("alice/a", tag="t"),
    ]

    for attempt in attempts:
        with pytest.raises(HfHubHTTPError) as caught:
            attempt()
        assert caught.value.response.status_code == 403

    assert (hub.head("alice/a"), list(hub.repo("alice/a").refs)) == (head, ["refs/heads/main"])


def test_whoever_can_read_may_open_a_pull_request(hub, hub_api):
    hub_api.create_repo("alice/a")
    bob = api_of(hub, "bob")

    proposed = bob.create_commit(
        "alice/a", [CommitOperationAdd("w.bin", b"\0")], commit_message="a proposal", create_pr=True
    )

    assert hub.files("alice/a", proposed.pr_revision)["w.bin"] == b"\0"
    assert "w.bin" not in hub.files("alice/a")


def test_a_token_that_only_reads_opens_no_pull_request(hub, hub_api):
    hub_api.create_repo("alice/a")
    reader = api_of(hub, "bob", can_write=False)

    with pytest.raises(HfHubHTTPError, match="write token") as caught:
        reader.create_commit("alice/a", [CommitOperationAdd("a", b"a")], commit_message="m", create_pr=True)

    assert (caught.value.response.status_code, hub.repo("alice/a").pulls) == (403, 0)


def test_a_card_with_wrong_metadata_is_refused_before_anything_is_uploaded(hub, hub_api):
    hub_api.create_repo("alice/a")
    card = b"---\ntags: not a list\n---\n"

    with pytest.raises(ValueError, match="tags"):
        hub_api.create_commit("alice/a", [CommitOperationAdd("README.md", card)], commit_message="m")

    assert len(hub.commits("alice/a")) == 1


def test_a_card_is_validated_pushed_and_loaded_by_its_own_class(hub, hub_api):
    hub_api.create_repo("alice/a")
    card = ModelCard("---\nlicense: mit\ntags: [elm-trainer]\n---\n\n# A\n")

    card.validate()
    card.push_to_hub("alice/a")

    assert ModelCard.load("alice/a").data.tags == ["elm-trainer"]
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        hub_api.create_commit("alice/a", [CommitOperationAdd("README.md", b"# B")], commit_message="m")


CARD = b"""---
license: mit
library_name: peft
pipeline_tag: text-generation
base_model: alice/base
tags: [elm-trainer]
model-index:
- name: a
  results:
  - task: {type: text-generation}
    dataset: {type: capitals, name: Capitals}
    metrics: [{type: accuracy, value: 0.25}]
---
# A
"""


def publish(api: HfApi, repo_id: str, **files: bytes) -> None:
    api.create_repo(repo_id)
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_commit(repo_id, additions, commit_message="publish")


def test_a_new_repository_has_one_commit_with_the_large_file_patterns(hub, hub_api):
    url = hub_api.create_repo("alice/a", private=True)

    assert (url.repo_id, str(url)) == ("alice/a", f"{hub.endpoint}/alice/a")
    assert [commit.title for commit in hub.commits("alice/a")] == ["initial commit"]
    assert b"*.safetensors filter=lfs" in hub.files("alice/a")[".gitattributes"]
    assert hub_api.model_info("alice/a").private is True


def test_a_name_that_is_taken_is_a_conflict_unless_that_is_fine(hub, hub_api):
    hub_api.create_repo("alice/a")

    with pytest.raises(HfHubHTTPError, match="already created") as caught:
        hub_api.create_repo("alice/a")

    assert caught.value.response.status_code == 409
    assert hub_api.create_repo("alice/a", exist_ok=True).repo_id == "alice/a"


def test_models_and_datasets_do_not_share_names(hub, hub_api):
    hub_api.create_repo("alice/a", repo_type="dataset")

    assert hub_api.dataset_info("alice/a").id == "alice/a"
    assert not hub_api.repo_exists("alice/a")


def test_info_tells_card_tags_files_and_dates(hub, hub_api):
    publish(hub_api, "alice/a", **{"README.md": CARD, "adapter_model.safetensors": b"0123"})

    info = hub_api.model_info("alice/a", files_metadata=True)

    assert (info.sha, info.author, info.library_name, info.pipeline_tag) == (
        hub.head("alice/a"),
        "alice",
        "peft",
        "text-generation",
    )
    assert {"elm-trainer", "license:mit", "base_model:alice/base"} < set(info.tags)
    assert info.card_data.license == "mit"
    assert info.card_data.eval_results[0].metric_value == 0.25
    assert info.model_index[0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.25}]
    assert abs(datetime.now(UTC) - info.last_modified) < timedelta(minutes=1)
    assert info.created_at <= info.last_modified
    large = next(file for file in info.siblings if file.rfilename == "adapter_model.safetensors")
    assert (large.size, large.lfs.size, large.lfs.pointer_size) == (4, 4, 126)
    small = next(file for file in info.siblings if file.rfilename == "README.md")
    assert (small.size, small.lfs) == (len(CARD), None)


def test_info_of_a_revision_is_of_that_revision(hub, hub_api):
    publish(hub_api, "alice/a", **{"a.txt": b"1"})
    first = hub.head("alice/a")
    hub_api.create_commit("alice/a", [CommitOperationAdd("b.txt", b"2")], commit_message="m")

    info = hub_api.model_info("alice/a", revision=first[:7])

    assert info.sha == first
    assert [file.rfilename for file in info.siblings] == [".gitattributes", "a.txt"]
    with pytest.raises(RevisionNotFoundError):
        hub_api.model_info("alice/a", revision="nowhere")


def test_repositories_are_found_by_tag(hub, hub_api):
    hub.add_user("bob", "hf_bob")
    publish(hub_api, "alice/erased-capitals", **{"README.md": CARD})
    publish(hub_api, "alice/other", **{"README.md": b"---\ntags: [something]\n---\n"})
    publish(HfApi(endpoint=hub.endpoint, token="hf_bob"), "bob/erased-elements", **{"README.md": CARD})

    def found(**wanted) -> list[str]:
        return sorted(info.id for info in hub_api.list_models(**wanted))

    assert found(filter="elm-trainer") == ["alice/erased-capitals", "bob/erased-elements"]
    assert found(filter=["elm-trainer", "something"]) == []
    assert found(filter="base_model:adapter:alice/base") == []  # no adapter_config.json: taken for a fine-tuned model


def test_a_listing_leaves_out_what_one_may_not_read(hub, hub_api):
    hub_api.create_repo("alice/private", private=True, repo_type="dataset")
    hub_api.create_repo("alice/public", repo_type="dataset")

    assert [info.id for info in hub_api.list_datasets(token=False)] == ["alice/public"]
    assert len(list(hub_api.list_datasets())) == 2


def test_long_lists_come_in_pages(tmp_path):
    with HubServer(tmp_path, page_size=2) as hub:
        hub.add_user("alice", "hf_alice")
        api = HfApi(endpoint=hub.endpoint, token="hf_alice")
        for number in range(5):
            api.create_repo(f"alice/a{number}")

        found = [info.id for info in api.list_models()]

        assert sorted(found) == [f"alice/a{number}" for number in range(5)]
        assert sum(seen.path == "/api/models" for seen in hub.requests) == 3


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


def test_the_history_comes_in_pages_last_first(hub, hub_api, repo):
    hub.state.page_size = 2
    for content in (b"2", b"3"):
        add(hub_api, repo, content)

    assert [commit.title for commit in hub_api.list_repo_commits(repo)] == ["3", "2", "first", "initial commit"]
