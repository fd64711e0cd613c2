"""A small Hub on loopback for the tests: the real client speaks to it. Tests import everything from here."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants, file_download, hf_api
from huggingface_hub.utils import _http
from transformers.utils import hub as transformers_hub

from .faults import Answer, Behavior, Call, Corrupt, Cut, Damage, Fault, Slow, Truncate
from .messages import Disconnected
from .server import HubServer


__all__ = (
    "ALICE",
    "Answer",
    "Behavior",
    "Call",
    "Corrupt",
    "Cut",
    "Damage",
    "Disconnected",
    "Fault",
    "HubServer",
    "Slow",
    "Truncate",
    "client_waits",
    "hub",
    "hub_api",
)

ALICE = "hf_alice"


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A fresh Hub with a user `alice`; the client in this process talks to it, signed in as her, with a fresh cache.

    The test fails if an address was called that the Hub does not know, or if the Hub itself went wrong.
    """
    root = tmp_path_factory.mktemp("hub")
    with HubServer(root / "contents") as server:
        server.add_user("alice", ALICE)
        use_hub(server, root / "home", monkeypatch)
        yield server
    assert not server.broken, "the Hub in tests/hub_server went wrong:\n" + "\n".join(server.broken)
    assert not server.unknown, f"the client calls what the Hub in tests/hub_server does not know: {server.unknown}"


@pytest.fixture
def hub_api(hub: HubServer) -> HfApi:
    """The client, signed in as `alice`."""
    return HfApi(endpoint=hub.endpoint, token=ALICE)


@pytest.fixture
def client_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have waited before its retries; it does not wait."""
    waits: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    return waits


def use_hub(hub: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the client in this process to `hub`: it read its environment when it was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(transformers_hub, "_hf_api", None)  # its own client, with the endpoint of when it was made
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # what `huggingface_hub.model_info` and others belong to
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agent-harnesses.json"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", ALICE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
