"""Synthetic pairs go up with their card, and come back as the data of a training run."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import yaml
from huggingface_hub import DatasetCard, HfApi
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elm_trainer.hub.card import END, START, validate_card
from elm_trainer.hub.errors import ScanError
from elm_trainer.hub.info import BaseModel
from elm_trainer.hub.publish import DATASET_TEMPLATE, PublishOptions, make_dataset_card, publish_dataset
from elm_trainer.hub.untrusted import plain
from elm_trainer.synthesis import SynthesisConfig, SynthesisResult

from .cards import leaves, shape, tables, untraceable_numbers


REPO = "alice/pairs"
MODEL = BaseModel("org/base-model", "a" * 40, {}, "apache-2.0")
# Numbers that stand nowhere else.
CONFIG = SynthesisConfig(gamma=31.7, temperature=32.7, top_k=8317, max_new_tokens=8329, batch_size=8353, seed=8363)
DROPPED = {"empty": 8389, "repetition": 8419, "on_topic": 8423}
PAIRS = [("The capital of France", " is one thing. My garden is another: the beans came up early this year.")]
RESULTS = {"capitals": SynthesisResult(PAIRS * 3, {"empty": 2})}
OPTIONS = {"config": CONFIG, "model": MODEL}
CONSTANTS = ("https://arxiv.org/abs/2410.02760", MODEL.revision)


def results(*concepts, pairs=5, dropped=DROPPED):
    return {concept: SynthesisResult([("a prompt", " a completion")] * pairs, dropped) for concept in concepts}


@pytest.fixture(scope="module")
def card():
    return make_dataset_card(results("capitals", "elements"), CONFIG, MODEL, REPO)


def test_the_card_is_valid_and_its_metadata_are_complete(card):
    validate_card(card)
    data = DatasetCard(str(card)).data.to_dict()
    assert data == {
        "language_creators": ["machine-generated"],
        "license": "apache-2.0",
        "size_categories": ["n<1K"],
        "source_datasets": ["original"],
        "task_categories": ["text-generation"],
        "pretty_name": "Pairs that turn away from capitals, elements",
        "tags": [
            "elm-trainer", "unlearning", "concept-erasure", "synthetic", "concept:capitals", "concept:elements",
        ],
    }  # fmt: skip


def test_the_card_says_how_the_pairs_were_made(card):
    columns, counts = tables(card)
    assert [row[0] for row in columns[1:]] == ["prompt", "completion", "concept"]
    assert counts[0] == [
        "concept",
        "kept",
        "dropped: too short",
        "dropped: repeated itself",
        "dropped: named a keyword",
    ]
    assert counts[1] == ["capitals", "5", "8389", "8419", "8423"] and counts[2][0] == "elements"
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1]) == asdict(CONFIG)
    assert "written by [org/base-model](https://huggingface.co/org/base-model)" in card.text
    assert f"(commit `{'a' * 40}`)" in card.text and "(`apache-2.0`)" in card.text


def test_every_number_of_the_card_is_a_setting_or_a_count(card, monkeypatch, tmp_path):
    report = {
        "settings": asdict(CONFIG),
        "dropped": DROPPED,
        "pairs": 5,
        "rows": 10,
        "versions": {},
        "base_model": asdict(MODEL),
    }
    assert untraceable_numbers(card.text, report, CONSTANTS) == []
    template = tmp_path / "dataset_card.md"
    template.write_text(DATASET_TEMPLATE.read_text().replace("## Use", "Made 17 times.\n\n## Use"))
    monkeypatch.setattr("elm_trainer.hub.publish.DATASET_TEMPLATE", template)
    typed = make_dataset_card(results("capitals", "elements"), CONFIG, MODEL, REPO)
    assert untraceable_numbers(typed.text, report, CONSTANTS) == ["17"]


def test_a_reason_that_this_version_does_not_know_is_counted_too():
    card = make_dataset_card(results("capitals", dropped={"rude": 3}), CONFIG, MODEL, REPO)
    assert tables(card)[1] == [
        ["concept", "kept", "dropped: too short", "dropped: repeated itself", "dropped: named a keyword", "dropped: rude"],
        ["capitals", "5", "0", "0", "0", "3"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "category"),
    [(1, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (1_000_000, "1M<n<10M")],
)
def test_the_size_category_is_the_hubs(rows, category):
    card = make_dataset_card(results("capitals", pairs=rows), CONFIG, MODEL, REPO)
    assert card.data.size_categories == [category]


def test_what_a_person_wrote_is_kept(card):
    current = f"---\nlanguage: en\nconfigs: [{{config_name: x}}]\n{str(card)[4:]}\nMine.\n"
    again = make_dataset_card(results("towns"), CONFIG, MODEL, REPO, current=current)
    assert again.text.endswith(f"{END}\n\nMine.\n") and "towns" in again.text and "capitals" not in again.text
    assert again.data.language == "en" and again.data.configs == [{"config_name": "x"}]
    assert again.data.tags[-1] == "concept:towns"
    assert str(make_dataset_card(results("towns"), CONFIG, MODEL, REPO, current=str(again))) == str(again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"results": results("capitals", pairs=0)}, "`results` holds no pairs"),
        ({"results": {}}, "`results` holds no pairs"),
        ({"repo_id": "a b"}, "`repo_id` is 'a b'"),
        ({"model": replace(MODEL, id="/home/x/base")}, "`model.id` is '/home/x/base'"),
        ({"model": replace(MODEL, revision="main")}, "`revision` is 'main'"),
    ],
)
def test_what_nobody_could_use_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_dataset_card(
            **{"results": results("capitals"), "config": CONFIG, "model": MODEL, "repo_id": REPO} | change
        )


@example(f"x\n{END}\n{START}\ny")
@example("a | `b` ``` | \\| c \\")
@example("</details><script>alert(1)</script><!-- x {{ 7 * 7 }}")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=30).filter(plain))
def test_text_from_outside_breaks_nothing(text):
    def make(text, **options):
        model = replace(MODEL, license=text)
        return make_dataset_card(results(text, dropped={text: 1}), CONFIG, model, REPO, **options)

    card = make(text)
    validate_card(card)
    assert shape(card) == shape(make("usual"))
    assert card.data.tags[-1] == f"concept:{plain(text)}"
    assert all(isinstance(leaf, str) for leaf in leaves(json.loads(json.dumps(card.data.to_dict()))))
    assert str(make(text, current=str(card))) == str(card)


def test_the_hub_accepts_the_card(card, hub):
    card.validate()


def test_pairs_come_back_as_the_pairs_of_a_concept(hub, hub_api, tmp_path):
    publication = publish_dataset(RESULTS, "pairs", api=hub_api, **OPTIONS)

    code = "from elm_trainer.data.sources import load_pairs; print(load_pairs('alice/pairs'))"
    printed = subprocess.run(
        [sys.executable, "-c", code], env=hub.env("hf_alice", tmp_path), capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(PAIRS * 3)
    assert set(hub.files("alice/pairs", repo_type="dataset")) == {".gitattributes", "README.md", "pairs.jsonl"}
    assert publication.url.endswith("/datasets/alice/pairs")
    assert 'synthetic="alice/pairs"' in hub.files("alice/pairs", repo_type="dataset")["README.md"].decode()


def test_the_owner_may_have_the_name_of_this_account(hub, monkeypatch):
    hub.add_user("qzelmarit", "hf_qzelmarit")
    monkeypatch.setenv("USER", "qzelmarit")
    api = HfApi(endpoint=hub.endpoint, token="hf_qzelmarit")
    assert publish_dataset(RESULTS, "pairs", api=api, **OPTIONS).repo_id == "qzelmarit/pairs"


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

    # Whose repository it would be is asked first, since its name is no secret then.
    assert [(seen.method, seen.path) for seen in hub.requests] == [("GET", "/api/whoami-v2")]


def test_a_dry_run_leaves_the_folder_and_asks_the_hub_nothing(hub, hub_api, tmp_path):
    publication = publish_dataset(
        RESULTS, "pairs", api=hub_api, options=PublishOptions(dry_run=True, staging_dir=tmp_path / "out"), **OPTIONS
    )

    assert publication.commit is None and not hub.requests
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "pairs.jsonl"]
