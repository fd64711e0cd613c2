"""Synthetic pairs go up with their card, and come back as the data of a training run."""

import subprocess
import sys

import pytest

from elm_trainer.hub.errors import ScanError
from elm_trainer.hub.info import BaseModel
from elm_trainer.hub.publish import PublishOptions
from elm_trainer.hub.publish_dataset import publish_dataset
from elm_trainer.synthesis import SynthesisConfig, SynthesisResult


MODEL = BaseModel("org/base", "0" * 40, {}, "apache-2.0")
PAIRS = [("The capital of France", " is one thing. My garden is another: the beans came up early this year.")]
RESULTS = {"capitals": SynthesisResult(PAIRS * 3, {"empty": 2})}
OPTIONS = {"config": SynthesisConfig(), "model": MODEL}


def test_pairs_come_back_as_the_pairs_of_a_concept(hub, hub_api, tmp_path):
    publication = publish_dataset(RESULTS, "pairs", api=hub_api, **OPTIONS)

    code = "from elm_trainer.data.sources import load_pairs; print(load_pairs('alice/pairs'))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env=hub.env("hf_alice", tmp_path), capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(PAIRS * 3)
    assert set(hub.files("alice/pairs", repo_type="dataset")) == {".gitattributes", "README.md", "pairs.jsonl"}
    assert publication.url.endswith("/datasets/alice/pairs")


def test_the_same_pairs_again_commit_nothing_and_what_a_person_wrote_stays(hub, hub_api):
    publish_dataset(RESULTS, "pairs", api=hub_api, **OPTIONS)
    card = hub.files("alice/pairs", repo_type="dataset")["README.md"].decode() + "\nRead by Ada.\n"
    hub_api.upload_file(
        path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="alice/pairs", repo_type="dataset"
    )

    publication = publish_dataset(RESULTS, "pairs", api=hub_api, **OPTIONS)

    assert not publication.changed
    assert "Read by Ada." in hub.files("alice/pairs", repo_type="dataset")["README.md"].decode()


def test_a_passage_of_forget_text_is_stopped_before_anything_is_sent(hub, hub_api):
    forget = ["The beans came up early this year."]

    with pytest.raises(ScanError, match="pairs.jsonl:1"):
        publish_dataset(RESULTS, "pairs", api=hub_api, forget=forget, **OPTIONS)

    assert not hub.requests


def test_a_dry_run_leaves_the_folder_and_asks_the_hub_nothing(hub, hub_api, tmp_path):
    publication = publish_dataset(
        RESULTS, "pairs", api=hub_api, options=PublishOptions(dry_run=True, staging_dir=tmp_path / "out"), **OPTIONS
    )

    assert publication.commit is None and not hub.requests
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "pairs.jsonl"]
