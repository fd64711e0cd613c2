import copy
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import hub as transformers_hub

from elm_trainer.hub.errors import (
    BaseMismatchError,
    HubError,
    PermissionDeniedError,
    UnsafeAdapterError,
    VerificationError,
)
from elm_trainer.hub.export import export_gguf_adapter
from elm_trainer.hub.load import load_erased
from elm_trainer.modeling import DEMO_MODEL, demo_model_file, load_model

from ..hub_server import Corrupt, Cut, Fault, Truncate
from .data.make_adapter import FOLDER, IDS, tiny_base
from .published import adapt, edit_json, logits, seal, write_published


@pytest.fixture
def erased(base_folder):
    return adapt(AutoModelForCausalLM.from_pretrained(base_folder))


@pytest.fixture
def adapter_folder(erased, base_folder, tokenizer, tmp_path):
    return write_published(erased, tokenizer, tmp_path / "adapter", base_folder)


def test_a_published_folder_gives_the_same_logits_bit_for_bit(adapter_folder, erased, tokenizer):
    model, loaded_tokenizer = load_erased(adapter_folder, verify=True)
    assert torch.equal(logits(model), logits(erased))
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert loaded_tokenizer("The capital of Peru")["input_ids"] == tokenizer("The capital of Peru")["input_ids"]


def test_peft_alone_loads_what_is_published(adapter_folder, base_folder, erased):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    assert torch.equal(logits(PeftModel.from_pretrained(base, adapter_folder)), logits(erased))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter_folder)), logits(erased))


@pytest.mark.parametrize("as_model", [True, False])
def test_another_place_of_the_same_base_can_be_named(as_model, adapter_folder, base_folder, erased, tmp_path):
    edit_json(adapter_folder / "adapter_config.json", base_model_name_or_path="org/base")
    seal(adapter_folder)
    moved = base_folder.rename(tmp_path / "moved")
    base = AutoModelForCausalLM.from_pretrained(moved) if as_model else str(moved)
    model, _ = load_erased(adapter_folder, base_model=base, verify=True)
    assert torch.equal(logits(model), logits(erased))
    if as_model:
        assert model.get_base_model() is base


def test_another_base_is_refused_unless_it_is_allowed(adapter_folder, base_folder):
    other = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(BaseMismatchError, match="the weights differ.*`allow_mismatch=True`"):
        load_erased(adapter_folder, base_model=other)
    assert other.state_dict().keys() == before.keys()
    model, _ = load_erased(adapter_folder, base_model=other, allow_mismatch=True)
    assert torch.equal(logits(model.unload()), logits(other))


def test_a_model_that_fails_verification_is_handed_back_as_it_was(adapter_folder, base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        base.model.norm.weight.mul_(3)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(VerificationError, match="another likelihood"):
        load_erased(adapter_folder, base_model=base, allow_mismatch=True, verify=True)
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_unloading_leaves_the_base_bit_for_bit(adapter_folder, base_folder):
    model, _ = load_erased(adapter_folder)
    base = model.unload()
    expected = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    found = base.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert type(base).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_type_of_the_base_can_be_chosen(dtype, adapter_folder):
    model, _ = load_erased(adapter_folder, dtype=dtype, verify=True)
    assert model.get_base_model().dtype == getattr(torch, dtype)


def test_a_quantised_base_is_checked_as_far_as_it_can_be(adapter_folder, base_folder, erased):
    config = BitsAndBytesConfig(load_in_8bit=True)
    model, _ = load_erased(
        adapter_folder, quantization_config=config, device_map={"": "cpu"}, dtype="float32", verify=True
    )
    assert any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    assert torch.allclose(logits(model), logits(erased), atol=0.1) and not torch.equal(logits(model), logits(erased))
    other = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    other.save_pretrained(base_folder)
    with pytest.raises(BaseMismatchError, match="embeddings, norms or biases differ"):
        load_erased(adapter_folder, quantization_config=config, device_map={"": "cpu"})


def test_the_adapters_own_tokenizer_is_preferred(adapter_folder, tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ messages[0]['content'] }} is asked"
    changed.save_pretrained(adapter_folder)
    with pytest.raises(UnsafeAdapterError, match="is not among the files that erasure.json vouches for"):
        load_erased(adapter_folder)
    seal(adapter_folder)
    _, loaded = load_erased(adapter_folder)
    assert loaded.chat_template == changed.chat_template


def test_a_tokenizer_for_another_base_is_refused(adapter_folder, tokenizer):
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(["<new>"])
    grown.save_pretrained(adapter_folder)
    seal(adapter_folder)
    with pytest.raises(UnsafeAdapterError, match="knows 49153 tokens, but the base has 49152"):
        load_erased(adapter_folder)


def test_a_plain_folder_of_a_trainer_loads_unverified(erased, tokenizer, tmp_path):
    erased.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "training_args.bin").write_bytes(b"never read")
    model, _ = load_erased(tmp_path / "plain")
    assert torch.equal(logits(model), logits(erased))
    with pytest.raises(ValueError, match="`verify` is True, but .*plain stores no questions"):
        load_erased(tmp_path / "plain", verify=True)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "report.json", "adapter_config.json"])
def test_a_file_that_was_changed_after_publishing_is_named(name, adapter_folder):
    path = adapter_folder / name
    raw = bytearray(path.read_bytes())
    if name.endswith(".json"):
        raw += b"\n"
    else:
        raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UnsafeAdapterError, match=f"{name} is not the file that was published: its SHA-256 is"):
        load_erased(adapter_folder)


def test_a_file_that_is_missing_is_named(adapter_folder):
    (adapter_folder / "report.json").unlink()
    with pytest.raises(UnsafeAdapterError, match="names report.json, which is missing"):
        load_erased(adapter_folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"id": 5},
        {"fingerprint": ["a"]},
        {"fingerprint": {"weights": 1}},
        {"revision": None},
        {"gguf_file": "../other.gguf"},
        {"extra": 1},
    ],
)
def test_an_erasure_json_of_another_form_is_refused(changes, adapter_folder):
    content = json.loads((adapter_folder / "erasure.json").read_text())
    edit_json(adapter_folder / "erasure.json", base_model=content["base_model"] | changes)
    with pytest.raises(UnsafeAdapterError, match="erasure.json"):
        load_erased(adapter_folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "names no base in adapter_config.json: pass `base_model`"),
        ("/home/someone/models/base", "trained on /home/someone/models/base, which is no id on the Hub and no folder"),
    ],
)
def test_a_base_that_cannot_be_found_names_what_to_do(name, message, erased, tmp_path):
    erased.save_pretrained(tmp_path / "plain")
    edit_json(tmp_path / "plain" / "adapter_config.json", base_model_name_or_path=name)
    with pytest.raises(HubError, match=message):
        load_erased(tmp_path / "plain")


def test_a_base_that_is_not_in_the_cache_names_what_to_do(adapter_folder, tmp_path):
    edit_json(adapter_folder / "adapter_config.json", base_model_name_or_path="org/base", revision="0" * 40)
    content = json.loads((adapter_folder / "erasure.json").read_text())
    edit_json(adapter_folder / "erasure.json", base_model=content["base_model"] | {"id": "org/base"})
    seal(adapter_folder)
    with pytest.raises(HubError, match="base model org/base at 000.* could not be loaded.*load it once before"):
        load_erased(adapter_folder, cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_base_in_a_pickle_is_loaded_only_if_the_user_names_it(adapter_folder, base_folder, erased):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    (base_folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), base_folder / "pytorch_model.bin")
    with pytest.raises(HubError, match="base model .* could not be loaded"):
        load_erased(adapter_folder)
    loaded, _ = load_erased(adapter_folder, base_model=str(base_folder))
    assert torch.equal(logits(loaded), logits(erased))


def test_a_base_that_carries_an_adapter_is_refused(adapter_folder, erased):
    with pytest.raises(ValueError, match="`base_model` carries an adapter already"):
        load_erased(adapter_folder, base_model=erased)


def test_a_base_that_is_itself_an_adapter_is_refused(adapter_folder, base_folder):
    shutil.copy(adapter_folder / "adapter_config.json", base_folder)
    shutil.copy(adapter_folder / "adapter_model.safetensors", base_folder)
    with pytest.raises(UnsafeAdapterError, match="base model .* is itself an adapter"):
        load_erased(adapter_folder)


def test_a_gguf_base_is_not_quantised_again():
    with pytest.raises(ValueError, match="is a GGUF file, whose weights are loaded as floats"):
        load_model(DEMO_MODEL, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="is a GGUF file"):
        load_model(str(demo_model_file().parent), quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_no_folder_and_no_repository_is_named(tmp_path):
    with pytest.raises(HubError, match="is no folder here, and no id on the Hub"):
        load_erased(tmp_path / "nothing")
    with pytest.raises(HubError, match="org/unknown is not in the cache: load it once"):
        load_erased("org/unknown", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2"])
def test_adapters_of_the_oldest_and_the_newest_peft_load(version, tokenizer, tmp_path):
    tiny_base().save_pretrained(tmp_path)
    tokenizer.train_new_from_iterator(["a few words"], 300).save_pretrained(tmp_path)
    folder = FOLDER / f"peft-{version}"
    assert json.loads((folder / "adapter_config.json").read_text())["peft_version"] == version
    model, _ = load_erased(folder, base_model=str(tmp_path))
    stored = torch.tensor(json.loads((folder / "logits.json").read_text()))
    assert torch.allclose(logits(model, IDS)[0], stored, atol=2e-5)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, IDS)[0], stored, atol=0.1)


@pytest.fixture
def on_hub(hub, hub_api, erased, base_folder, tokenizer, tmp_path, monkeypatch):
    """A base and an erasure of it on the Hub."""
    # transformers keeps a client, which would go on talking to the Hub of the test before.
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    hub_api.create_repo("alice/base")
    revision = hub_api.upload_folder(repo_id="alice/base", folder_path=base_folder).oid
    hub_api.create_repo("alice/erased")
    folder = write_published(erased, tokenizer, tmp_path / "staged", "alice/base", revision)
    (folder / "report.png").write_bytes(b"a picture")
    hub_api.upload_folder(repo_id="alice/erased", folder_path=folder)
    shutil.rmtree(base_folder)
    return "alice/erased"


def test_a_repository_loads_with_the_base_it_names(on_hub, erased):
    model, tokenizer = load_erased(on_hub, verify=True)
    assert torch.equal(logits(model), logits(erased))
    assert tokenizer.decode(tokenizer("Lima")["input_ids"]) == "Lima"


@pytest.mark.parametrize("fault", [Cut("content"), Truncate(100)], ids=["cut", "truncated"])
def test_a_download_that_breaks_off_is_taken_up_again(fault, on_hub, hub, erased):
    fault = hub.fail(Fault("GET", "/objects/", fault))
    model, _ = load_erased(on_hub)
    assert torch.equal(logits(model), logits(erased))
    assert fault.times == 0


def test_a_download_that_is_too_short_is_named_and_the_next_one_is_whole(on_hub, hub, erased):
    hub.fail(Fault("GET", f"/objects/{adapter_hash(hub)}", Truncate(100, consistent=True)))
    with pytest.raises(HubError, match="could not be fetched whole.*again"):
        load_erased(on_hub)
    model, _ = load_erased(on_hub)
    assert torch.equal(logits(model), logits(erased))


def test_a_download_with_another_hash_is_named_and_loads_once_it_is_deleted(on_hub, hub, erased):
    hub.fail(Fault("GET", f"/objects/{adapter_hash(hub)}", Corrupt(5000)))
    with pytest.raises(UnsafeAdapterError, match="adapter_model.safetensors is not the file.*Delete") as raised:
        load_erased(on_hub)
    Path(re.search(r"Delete (\S+),", str(raised.value))[1]).unlink()
    model, _ = load_erased(on_hub)
    assert torch.equal(logits(model), logits(erased))


def adapter_hash(hub):
    return hashlib.sha256(hub.files("alice/erased")["adapter_model.safetensors"]).hexdigest()


def test_only_what_is_needed_is_downloaded(on_hub, tmp_path):
    load_erased(on_hub, cache_dir=tmp_path / "cache")
    [snapshot] = (tmp_path / "cache" / "models--alice--erased" / "snapshots").iterdir()
    names = sorted(path.name for path in snapshot.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "erasure.json", "report.json"]


def test_an_adapter_in_a_cache_is_exported_without_the_hub(on_hub, tmp_path):
    load_erased(on_hub, cache_dir=tmp_path / "cache")
    file = export_gguf_adapter(on_hub, tmp_path / "a.gguf", cache_dir=tmp_path / "cache", local_files_only=True)
    assert file.stat().st_size > 0


def test_it_loads_from_the_cache_in_another_process_without_the_hub(on_hub, erased, hub, tmp_path):
    load_erased(on_hub, cache_dir=tmp_path / "cache")
    again, _ = load_erased(on_hub, cache_dir=tmp_path / "cache", local_files_only=True, verify=True)
    assert torch.equal(logits(again), logits(erased))
    script = f"""
import torch
from elm_trainer.hub.load import load_erased
model, _ = load_erased({on_hub!r}, cache_dir={str(tmp_path / "cache")!r}, verify=True)
with torch.no_grad():
    torch.save(model(torch.tensor([[5, 9, 200, 31]])).logits, {str(tmp_path / "logits")!r})
"""
    environment = hub.env() | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert torch.equal(torch.load(tmp_path / "logits"), logits(erased))


def test_peft_alone_loads_the_repository(on_hub, erased):
    model = AutoPeftModelForCausalLM.from_pretrained(on_hub)
    assert torch.equal(logits(model), logits(erased))


def test_a_repository_of_an_earlier_commit_can_be_named(on_hub, hub_api, erased):
    before = hub_api.model_info(on_hub).sha
    hub_api.delete_file("adapter_config.json", on_hub)
    with pytest.raises(HubError, match="alice/erased holds no adapter_config.json"):
        load_erased(on_hub)
    model, _ = load_erased(on_hub, revision=before)
    assert torch.equal(logits(model), logits(erased))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_model.bin", "alice/erased holds adapter_model.bin: a file of the type .bin may run code"),
        ("modeling_evil.py", "alice/erased holds modeling_evil.py: an adapter needs no code"),
    ],
)
def test_a_repository_is_refused_by_its_listing_before_anything_is_fetched(name, message, on_hub, hub_api, tmp_path):
    hub_api.upload_file(path_or_fileobj=b"evil", path_in_repo=name, repo_id=on_hub)
    with pytest.raises(UnsafeAdapterError, match=message):
        load_erased(on_hub, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_repository_that_does_not_exist_is_named(hub):
    with pytest.raises(PermissionDeniedError, match="alice/nothing does not exist"):
        load_erased("alice/nothing")


@pytest.mark.slow
def test_a_gguf_base_is_found_in_its_repository(hub, hub_api, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    file = demo_model_file()
    hub_api.create_repo("alice/base-gguf")
    revision = hub_api.upload_file(path_or_fileobj=file, path_in_repo=file.name, repo_id="alice/base-gguf").oid
    base = load_model(DEMO_MODEL)
    base.name_or_path = str(file.parent)  # PEFT would look on the Hub for a model of the demo's short name
    erased = adapt(base, target_modules=["q_proj"])
    folder = write_published(erased, tokenizer, tmp_path / "staged", "alice/base-gguf", revision, file.name)
    hub_api.create_repo("alice/erased")
    hub_api.upload_folder(repo_id="alice/erased", folder_path=folder)
    model, loaded_tokenizer = load_erased("alice/erased", verify=True)
    assert torch.equal(logits(model), logits(erased))
    assert loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
    alone = AutoPeftModelForCausalLM.from_pretrained("alice/erased", gguf_file=file.name, dtype="float32")
    assert torch.equal(logits(alone), logits(erased))
