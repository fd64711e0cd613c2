import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError


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
        lambda: bob.update_repo_settings("alice/a", private=True),
        lambda: bob.auth_check("alice/a", write=True),
        lambda: bob.delete_repo("alice/a"),
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

    assert (caught.value.response.status_code, hub.repo("alice/a").discussions) == (403, {})


def test_a_gated_repository_is_described_but_not_downloaded(hub, hub_api):
    hub_api.create_repo("alice/a")
    hub_api.create_commit("alice/a", [CommitOperationAdd("a.txt", b"a")], commit_message="m")
    hub_api.update_repo_settings("alice/a", gated="manual")
    bob = api_of(hub, "bob")

    assert bob.model_info("alice/a").gated == "manual"
    with pytest.raises(GatedRepoError):
        bob.hf_hub_download("alice/a", "a.txt")
    with pytest.raises(GatedRepoError):
        bob.auth_check("alice/a")
    hub_api.auth_check("alice/a")


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
