"""Loading while the network or the Hub fails: the adapter is loaded whole, or a named error says why; then it loads."""

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from elm_trainer.hub import errors as failures
from elm_trainer.hub.errors import HubError, NotSignedInError, PermissionDeniedError, UnsafeAdapterError
from elm_trainer.hub.load import load_erased

from ..hub_server import Answer, Corrupt, Cut, Fault, Slow, Truncate
from .data.make_adapter import tiny_base
from .published import adapt, logits, write_published


API, BASE_API = r"^/api/models/alice/erased", r"^/api/models/alice/base"
OFTEN = 99
LOADS = None
UNREACHED = (HubError, "alice/erased could not be fetched, since the Hub can't be reached")
NOT_WHOLE = (HubError, "alice/erased could not be fetched whole .*load it again")
NO_BASE = (HubError, "The base model alice/base at [0-9a-f]{40} of alice/erased could not be loaded .*name a copy")
SENT_AROUND = Answer(302, {"Location": "?again"})


@pytest.fixture
def erased():
    return adapt(tiny_base())


@pytest.fixture
def on_hub(hub, hub_api, erased, tokenizer, tmp_path, client_waits, monkeypatch):
    """A base and an erasure of it on the Hub, and a client that does not wait."""
    waits = []
    monkeypatch.setattr(failures, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(failures, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    small = tokenizer.train_new_from_iterator(["a few words"], 300)
    tiny_base().save_pretrained(tmp_path / "base")
    small.save_pretrained(tmp_path / "base")
    hub_api.create_repo("alice/base")
    revision = hub_api.upload_folder(repo_id="alice/base", folder_path=tmp_path / "base").oid
    folder = write_published(erased, small, tmp_path / "staged", "alice/base", revision)
    hub_api.create_repo("alice/erased")
    hub_api.upload_folder(repo_id="alice/erased", folder_path=folder)
    hub.requests.clear()
    return SimpleNamespace(waits=waits, client_waits=client_waits)


def object_of(repo, name):
    """Path of a large file in the storage, of which only the hash is known once it is there."""
    return lambda hub: f"/objects/{hashlib.sha256(hub.files(repo)[name]).hexdigest()}"


ADAPTER = object_of("alice/erased", "adapter_model.safetensors")
BASE = object_of("alice/base", "model.safetensors")
FAULTS = {
    "listing 500 twice": ("GET", API, Answer(500), 2, LOADS),
    "listing 500": ("GET", API, Answer(500), OFTEN, UNREACHED),
    "listing 503 for a day": ("GET", API, Answer(503, {"Retry-After": "86400"}), 1, LOADS),
    "listing 429 twice": ("GET", API, Answer(429, {"Retry-After": "2"}), 2, LOADS),
    "listing 401": ("GET", API, Answer(401), OFTEN, (NotSignedInError, "hf auth login")),
    "listing 403": ("GET", API, Answer(403), OFTEN, (PermissionDeniedError, "the token may not do that")),
    "listing 404": ("GET", API, Answer(404), OFTEN, (HubError, "Loading alice/erased")),
    "listing 418": ("GET", API, Answer(418), OFTEN, (HubError, "Loading alice/erased")),
    "listing cut once": ("GET", API, Cut("before"), 1, LOADS),
    "listing cut": ("GET", API, Cut("before"), OFTEN, UNREACHED),
    "listing cut half-way once": ("GET", API, Cut("content"), 1, LOADS),
    "listing cut half-way": ("GET", API, Cut("content"), OFTEN, UNREACHED),
    "listing truncated once": ("GET", API, Truncate(9, consistent=True), 1, LOADS),
    "listing truncated": ("GET", API, Truncate(9, consistent=True), OFTEN, UNREACHED),
    "listing empty": ("GET", API, Truncate(0, consistent=True), OFTEN, UNREACHED),
    "listing of something else": ("GET", API, Answer(200), OFTEN, UNREACHED),
    "listing sent around": ("GET", API, SENT_AROUND, OFTEN, (HubError, "alice/erased could not be fetched")),
    "listing silent": ("GET", API, Slow(0.6), OFTEN, UNREACHED),
    "second listing silent": ("GET", API, Slow(0.6), OFTEN, NOT_WHOLE, 1),
    "second listing truncated": ("GET", API, Truncate(9, consistent=True), OFTEN, UNREACHED, 1),
    "file asked for 500 once": ("HEAD", "erased/resolve/.*adapter_config", Answer(500), 1, LOADS),
    "file asked for 500": ("HEAD", "erased/resolve/.*adapter_config", Answer(500), OFTEN, (HubError, "alice/erased")),
    "file asked for 404": ("HEAD", "erased/resolve/.*erasure.json", Answer(404), OFTEN, (HubError, "alice/erased")),
    "file asked for without a hash": ("HEAD", "erased/resolve/.*adapter_config", Answer(200), OFTEN, NOT_WHOLE),
    "settings truncated": ("GET", "erased/resolve/.*adapter_config", Truncate(9, consistent=True), 1, NOT_WHOLE),
    "settings cut": ("GET", "erased/resolve/.*adapter_config", Cut("content"), OFTEN, (HubError, "alice/erased")),
    "settings corrupt": (
        "GET", "erased/resolve/.*adapter_config", Corrupt(30), 1,
        (UnsafeAdapterError, "adapter_config.json is not the file|not JSON"),
    ),
    "weights cut once": ("GET", ADAPTER, Cut("content"), 1, LOADS),
    "weights cut": ("GET", ADAPTER, Cut("content"), OFTEN, (HubError, "alice/erased could not be fetched")),
    "weights not there": ("GET", ADAPTER, Answer(404), OFTEN, (HubError, "alice/erased")),
    "weights 403": ("GET", ADAPTER, Answer(403), OFTEN, (PermissionDeniedError, "alice/erased")),
    "weights 500": ("GET", ADAPTER, Answer(500), OFTEN, (HubError, "alice/erased")),
    "weights of another length": ("GET", ADAPTER, Truncate(100, consistent=True), 1, NOT_WHOLE),
    "weights corrupt": ("GET", ADAPTER, Corrupt(5000), 1, (UnsafeAdapterError, "adapter_model.safetensors is not the file")),
    "weights sent around": ("GET", ADAPTER, SENT_AROUND, OFTEN, (HubError, "alice/erased could not be fetched")),
    "weights dripping": ("GET", ADAPTER, Slow(0.01, drip=2_000), 1, LOADS),
    "base listing 401": ("GET", BASE_API, Answer(401), OFTEN, (NotSignedInError, "base model alice/base")),
    "base listing 403": ("GET", BASE_API, Answer(403), OFTEN, (PermissionDeniedError, "base model alice/base")),
    "base cut": ("*", "alice/base", Cut("before"), 999, NO_BASE),
    "base 500": ("*", "alice/base", Answer(500), 999, NO_BASE),
    "base listing truncated": ("GET", BASE_API, Truncate(9, consistent=True), OFTEN, LOADS),
    "base 429 twice": ("*", "alice/base", Answer(429, {"Retry-After": "1"}), 2, LOADS),
    "base config truncated": ("GET", "base/resolve/.*/config.json", Truncate(9, consistent=True), OFTEN, NO_BASE),
    "base config sent around": ("GET", "base/resolve/.*/config.json", SENT_AROUND, OFTEN, (HubError, "base model")),
    "base weights cut once": ("GET", BASE, Cut("content"), 1, LOADS),
    "base weights cut": ("GET", BASE, Cut("content"), OFTEN, (HubError, "base model alice/base")),
    "base weights of another length": ("GET", BASE, Truncate(100, consistent=True), OFTEN, NO_BASE),
    "base weights 403": ("GET", BASE, Answer(403), OFTEN, (HubError, "base model alice/base")),
    "base weights with a broken header": ("GET", BASE, Corrupt(9), 1, (HubError, "base model alice/base")),
    "base tokenizer 500": ("*", "base/resolve/.*/tokenizer", Answer(500), 999, (HubError, "alice/base")),
    "base tokenizer truncated": (
        "GET", "base/resolve/.*/tokenizer.json", Truncate(9, consistent=True), OFTEN, (HubError, "tokenizer of .*alice/base"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_in_a_whole_model_or_a_named_error(name, on_hub, hub, erased, tmp_path):
    method, path, behavior, times, expected, *skip = FAULTS[name]
    fault = hub.fail(Fault(method, path if isinstance(path, str) else path(hub), behavior, times, *skip))
    cache = tmp_path / "cache"
    if expected is LOADS:
        model, _ = load_erased("alice/erased", cache_dir=cache)
        assert torch.equal(logits(model), logits(erased))
    else:
        with pytest.raises(HubError, match=expected[1]) as raised:
            load_erased("alice/erased", cache_dir=cache)
        assert type(raised.value) is expected[0]
        assert "sig=" not in str(raised.value) and "X-Amz" not in str(raised.value)
        for broken in re.findall(r"Delete (\S+),", str(raised.value)):
            Path(broken).unlink()
    assert fault.times < times, "the fault met nothing"
    assert max([0, *on_hub.waits, *on_hub.client_waits]) <= failures.LONGEST_WAIT
    fault.times = 0
    if name == "base weights with a broken header":
        cache = tmp_path / "another"  # transformers takes what lies in its cache, whatever it is
    model, _ = load_erased("alice/erased", cache_dir=cache)
    assert torch.equal(logits(model), logits(erased))
    assert not list(cache.rglob("*.incomplete"))


def test_what_is_too_large_is_refused_by_its_size_before_it_is_fetched(on_hub, hub, hub_api):
    staged = hub.files("alice/erased")["erasure.json"]
    hub_api.upload_file(
        path_or_fileobj=b" " * 12_000_000 + staged, path_in_repo="erasure.json", repo_id="alice/erased"
    )
    hub.requests.clear()
    with pytest.raises(
        UnsafeAdapterError, match="alice/erased holds erasure.json of 1200.* bytes, more than 10000000"
    ):
        load_erased("alice/erased")
    assert sum(request.sent for request in hub.requests) < 100_000
    hub_api.upload_file(path_or_fileobj=staged, path_in_repo="erasure.json", repo_id="alice/erased")
    hub_api.upload_file(
        path_or_fileobj=b" " * 12_000_000 + b"{}", path_in_repo="generation_config.json", repo_id="alice/base"
    )
    revision = hub_api.model_info("alice/base").sha
    info = json.loads(staged)
    info["base_model"]["revision"] = revision
    hub_api.upload_file(path_or_fileobj=json.dumps(info).encode(), path_in_repo="erasure.json", repo_id="alice/erased")
    hub.requests.clear()
    with pytest.raises(
        UnsafeAdapterError, match="base model alice/base holds generation_config.json of 12000002 bytes"
    ):
        load_erased("alice/erased")
    assert sum(request.sent for request in hub.requests) < 1_000_000


def test_what_signs_a_url_is_not_told(on_hub, hub):
    hub.fail(Fault("GET", ADAPTER(hub), Answer(400), OFTEN))
    with pytest.raises(HubError) as raised:
        load_erased("alice/erased")
    signed = [request for request in hub.requests if request.path.startswith("/objects/")]
    assert signed
    assert not re.search(r"https?://\S*[?=]\w", str(raised.value))


def test_a_base_in_the_cache_loads_while_its_listing_fails(on_hub, hub, erased, tmp_path):
    load_erased("alice/erased", cache_dir=tmp_path / "cache")
    hub.fail(Fault("GET", BASE_API, Answer(500), OFTEN))
    model, _ = load_erased("alice/erased", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(model), logits(erased))


def test_a_folder_named_like_the_base_is_not_taken_for_it(on_hub, hub, tmp_path, monkeypatch):
    (tmp_path / "here" / "alice" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        HubError, match="trained on alice/base of the Hub, but there is a folder or file alice/base here"
    ):
        load_erased("alice/erased")
