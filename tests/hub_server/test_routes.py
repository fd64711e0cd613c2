import re
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _detect_agent

from .routes import ROUTES
from .server import HubServer, Seen


README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


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


def test_the_readme_names_the_version_of_the_client_that_is_installed():
    (named,) = re.findall(r"huggingface_hub (\d+\.\d+\.\d+)", README)

    assert named == huggingface_hub.__version__


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
def test_the_client_uses_every_address(hub, hub_api, monkeypatch):
    hub.state.multipart_from, hub.state.part_size = 2000, 1000
    monkeypatch.setattr(_detect_agent, "_registry", None)  # it is asked for once a process
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)

    hub_api.whoami()
    hub_api.create_repo("alice/a")
    hub_api.update_repo_settings("alice/a", private=True)
    hub_api.auth_check("alice/a")
    hub_api.auth_check("alice/a", write=True)
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
    hub_api.delete_branch("alice/a", branch="b")
    hub_api.delete_tag("alice/a", tag="t")
    hub_api.create_discussion("alice/a", "A question")
    hub_api.create_commit("alice/a", [CommitOperationAdd("b", b"b")], commit_message="m", create_pr=True)
    list(hub_api.get_repo_discussions("alice/a"))
    hub_api.change_discussion_status("alice/a", 1, new_status="closed")
    hub_api.merge_pull_request("alice/a", 2)
    hub_api.delete_repo("alice/a")

    assert {route_of(seen) for seen in hub.requests} == {f"{route.method} {route.path}" for route in ROUTES}
