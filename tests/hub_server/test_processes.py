"""Libraries that use the client in this process, and other processes, which know the Hub only by their environment."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, model_info, snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import ALICE


ROOT = Path(__file__).parents[2]


def run(hub, script: str, token: str | None = ALICE) -> str:
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=hub.env(token), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_a_process_uploads_and_another_one_downloads(hub):
    run(
        hub,
        """
        from huggingface_hub import create_repo, upload_file
        create_repo("alice/a")
        upload_file(repo_id="alice/a", path_or_fileobj=b"weights" * 1000, path_in_repo="a.safetensors")
        """,
    )
    read = run(
        hub,
        """
        from huggingface_hub import hf_hub_download
        print(len(open(hf_hub_download("alice/a", "a.safetensors"), "rb").read()))
        """,
        token=None,
    )

    assert read == "7000"
    assert hub.files("alice/a")["a.safetensors"] == b"weights" * 1000
    assert {seen.user for seen in hub.requests if seen.origin == "hub"} == {"alice", None}


def test_of_two_processes_with_the_same_parent_exactly_one_wins(hub, hub_api):
    hub_api.create_repo("alice/a")
    script = """
        import sys
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError
        name, parent = sys.argv[1:]
        try:
            HfApi().create_commit(
                "alice/a", [CommitOperationAdd(name, name.encode())], commit_message=name, parent_commit=parent
            )
            print("won")
        except HfHubHTTPError as error:
            print(error.response.status_code)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    running = [
        subprocess.Popen([*command, name, hub.head("alice/a")], env=hub.env(ALICE), stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]

    outcomes = sorted(process.communicate()[0].strip() for process in running)

    assert outcomes == ["412", "won"]
    assert len({"one", "two"} & set(hub.files("alice/a"))) == 1


def test_datasets_are_pushed_and_loaded(hub):
    run(
        hub,
        """
        import datasets
        pairs = datasets.Dataset.from_dict({"prompt": ["a", "b"], "completion": ["c", "d"]})
        pairs.push_to_hub("alice/pairs", private=True)
        """,
    )
    loaded = run(
        hub,
        """
        import json, datasets
        print(json.dumps(datasets.load_dataset("alice/pairs", split="train").to_list()))
        """,
    )

    assert json.loads(loaded.splitlines()[-1])[1] == {"prompt": "b", "completion": "d"}
    assert any(path.endswith(".parquet") for path in hub.files("alice/pairs", repo_type="dataset"))


@pytest.mark.slow
def test_transformers_finds_a_config(hub, hub_api):
    hub_api.create_repo("alice/tiny", private=True)
    config = json.dumps({"model_type": "llama", "hidden_size": 64}).encode()
    hub_api.create_commit("alice/tiny", [CommitOperationAdd("config.json", config)], commit_message="m")

    found = run(hub, "import transformers; print(transformers.AutoConfig.from_pretrained('alice/tiny').hidden_size)")

    assert found.splitlines()[-1] == "64"


def test_the_environment_leads_nowhere_else(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", "/elsewhere")

    env = hub.env(home=hub.state.root / "fresh")

    assert (env["HF_ENDPOINT"], env["HF_HOME"]) == (hub.endpoint, str(hub.state.root / "fresh"))
    assert {"HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"}.isdisjoint(env)
    assert env["PATH"] == os.environ["PATH"]


def test_the_hub_runs_by_itself(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    command = [sys.executable, "-m", "tests.hub_server", "--root", tmp_path, "--user", "carol:hf_carol"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as hub:
        try:
            assert hub.stderr
            told = list(
                iter(hub.stderr.readline, "Repositories are kept in memory and are gone when this ends (Ctrl-C).\n")
            )
            address, token = re.findall(r"HF_ENDPOINT=(\S+) .* HF_TOKEN=(\S+)", "".join(told))[0]
            api = HfApi(endpoint=address, token=token)
            base, file = re.findall(r"--base_model (\S+) --gguf_file (\S+)\n", "".join(told))[0]
            assert api.file_exists(base, file) and api.model_info(base).card_data.license == "apache-2.0"
            api.create_repo("carol/a")
            api.create_commit("carol/a", [CommitOperationAdd("a.bin", b"\0")], commit_message="m")
            path = api.hf_hub_download("carol/a", "a.bin", cache_dir=tmp_path / "cache")
            shown = [hub.stderr.readline() for _ in range(6)]
        finally:
            hub.terminate()

    assert Path(path).read_bytes() == b"\0"
    assert any(line.startswith("200 POST /api/repos/create (hub, carol, ") for line in shown)


TEST_OF_A_NEW_ADDRESS = """
from tests.hub_server import hub, hub_api

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
