"""Other processes, which know of the Hub only by their environment."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from .fixtures import ALICE


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
