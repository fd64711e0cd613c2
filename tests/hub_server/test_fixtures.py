"""The fixtures, and libraries that use the client in this process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, ModelCard, model_info, snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).parents[2]

TEST_OF_A_NEW_ADDRESS = """
from tests.hub_server.fixtures import hub, hub_api

def test_passes(hub_api):
    hub_api.create_repo("alice/a")

def test_calls_something_new(hub_api):
    try:
        list(hub_api.list_spaces())
    except Exception:
        pass  # even if the caller carries on
"""


def test_a_test_fails_if_the_client_calls_an_address_that_is_not_known(tmp_path):
    (tmp_path / "test_new.py").write_text(TEST_OF_A_NEW_ADDRESS)

    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert ran.returncode == 1
    assert "the client calls what the Hub in tests/hub_server does not know: ['GET /api/spaces']" in ran.stdout
    assert "2 passed, 1 error" in ran.stdout


def test_functions_of_the_client_talk_to_the_hub_in_this_process(hub, hub_api):
    hub_api.create_repo("alice/a", private=True)
    hub_api.create_commit(
        "alice/a", [CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n")], commit_message="m"
    )

    assert model_info("alice/a").sha == hub.head("alice/a")
    assert Path(snapshot_download("alice/a")).name == hub.head("alice/a")
    assert ModelCard.load("alice/a").data.license == "mit"


def test_models_and_adapters_are_loaded_from_the_hub_in_this_process(
    hub, hub_api, tiny_peft_model, tokenizer, tmp_path
):
    for name, weight in tiny_peft_model.named_parameters():
        if "lora_B" in name:  # zero at first: the adapter would change nothing
            torch.nn.init.normal_(weight)
    tokens = tokenizer("a few words", return_tensors="pt")
    expected = tiny_peft_model(**tokens).logits
    tiny_peft_model.save_pretrained(tmp_path / "adapter")
    tiny_peft_model.unload().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name in ("base", "adapter"):
        hub_api.create_repo(f"alice/{name}", private=True)
        hub_api.upload_folder(repo_id=f"alice/{name}", folder_path=tmp_path / name)

    base = AutoModelForCausalLM.from_pretrained("alice/base")
    loaded = PeftModel.from_pretrained(base, "alice/adapter")

    assert AutoTokenizer.from_pretrained("alice/base")("a few words").input_ids == tokens.input_ids[0].tolist()
    assert torch.equal(loaded(**tokens).logits, expected)


@pytest.mark.parametrize("path", ["refs/pr/1", "v1.0"])
def test_revisions_with_slashes_and_dots_are_found(hub, hub_api, path):
    hub_api.create_repo("alice/a")
    hub_api.create_tag("alice/a", tag="v1.0")
    hub_api.create_commit("alice/a", [CommitOperationAdd("a.txt", b"a")], commit_message="m", create_pr=True)

    assert snapshot_download("alice/a", revision=path).endswith(hub.head("alice/a", path))
