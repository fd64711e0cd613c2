from datetime import UTC, datetime, timedelta

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from .server import HubServer


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


def test_deleting_and_changing_visibility(hub, hub_api):
    hub_api.create_repo("alice/a")
    hub_api.update_repo_settings("alice/a", private=True)
    assert hub.repo("alice/a").private

    hub_api.delete_repo("alice/a")

    with pytest.raises(RepositoryNotFoundError):
        hub_api.delete_repo("alice/a")
    hub_api.delete_repo("alice/a", missing_ok=True)


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


def test_info_tells_only_what_was_asked_for(hub, hub_api):
    publish(hub_api, "alice/a", **{"README.md": CARD})

    info = hub_api.model_info("alice/a", expand=["sha", "baseModels"])

    assert (info.sha, info.base_models, info.tags, info.siblings) == (hub.head("alice/a"), ["alice/base"], None, None)


def test_repositories_are_found_by_tag_author_and_name(hub, hub_api):
    hub.add_user("bob", "hf_bob")
    publish(hub_api, "alice/erased-capitals", **{"README.md": CARD})
    publish(hub_api, "alice/other", **{"README.md": b"---\ntags: [something]\n---\n"})
    publish(HfApi(endpoint=hub.endpoint, token="hf_bob"), "bob/erased-elements", **{"README.md": CARD})

    def found(**wanted) -> list[str]:
        return sorted(info.id for info in hub_api.list_models(**wanted))

    assert found(filter="elm-trainer") == ["alice/erased-capitals", "bob/erased-elements"]
    assert found(filter=["elm-trainer", "something"]) == []
    assert found(filter="elm-trainer", author="bob") == ["bob/erased-elements"]
    assert found(search="CAPITALS") == ["alice/erased-capitals"]
    assert found(filter="base_model:adapter:alice/base") == []  # no adapter_config.json: taken for a fine-tuned model
    assert found(pipeline_tag="text-generation", limit=1) == ["bob/erased-elements"]


def test_a_listing_tells_more_on_request(hub, hub_api):
    publish(hub_api, "alice/a", **{"README.md": CARD})

    brief, full = next(hub_api.list_models()), next(hub_api.list_models(full=True, cardData=True))

    assert (brief.siblings, brief.card_data, brief.sha) == (None, None, None)
    assert [file.rfilename for file in full.siblings] == [".gitattributes", "README.md"]
    assert (full.sha, full.card_data.eval_results[0].metric_value) == (hub.head("alice/a"), 0.25)


def test_a_listing_leaves_out_what_one_may_not_read(hub, hub_api):
    hub_api.create_repo("alice/private", private=True, repo_type="dataset")
    hub_api.create_repo("alice/public", repo_type="dataset")

    assert [info.id for info in hub_api.list_datasets(token=False)] == ["alice/public"]
    assert len(list(hub_api.list_datasets(author="alice"))) == 2


def test_the_last_changed_comes_first_if_asked_for(hub, hub_api):
    for name in ("alice/a", "alice/b"):
        hub_api.create_repo(name)
    hub_api.create_commit("alice/a", [CommitOperationAdd("a.txt", b"1")], commit_message="m")

    assert [info.id for info in hub_api.list_models(sort="last_modified")] == ["alice/a", "alice/b"]
    assert [info.id for info in hub_api.list_models()] == ["alice/b", "alice/a"]


def test_long_lists_come_in_pages(tmp_path):
    with HubServer(tmp_path, page_size=2) as hub:
        hub.add_user("alice", "hf_alice")
        api = HfApi(endpoint=hub.endpoint, token="hf_alice")
        for number in range(5):
            api.create_repo(f"alice/a{number}")

        found = [info.id for info in api.list_models(author="alice")]

        assert sorted(found) == [f"alice/a{number}" for number in range(5)]
        assert sum(seen.path == "/api/models" for seen in hub.requests) == 3
