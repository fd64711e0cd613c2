"""From an adapter and its report on this machine to a repository, and back in another process."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from elm_trainer import ElmConfig, ElmTrainer
from elm_trainer.hub.errors import BaseMismatchError, ReloadError, ScanError, UnsafeAdapterError
from elm_trainer.hub.info import PUBLISHED_FILES
from elm_trainer.hub.publish import CardDetails, PublishOptions, publish_adapter


BASE, REPO = "alice/tiny-base", "alice/erased"
CARD = "---\nlicense: apache-2.0\n---\nA tiny base.\n"


@pytest.fixture
def base(hub, hub_api, local, tokenizer, tmp_path):
    """The adapter's base, as a model of its own and as a repository."""
    model = LlamaForCausalLM(local.model.config).eval()
    weights = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value
        for name, value in local.model.state_dict().items()
        if "lora_" not in name
    }
    model.load_state_dict(weights)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(CARD)
    hub_api.create_repo(BASE)
    hub_api.upload_folder(repo_id=BASE, folder_path=tmp_path / "base")
    return model


@pytest.fixture
def publish(hub_api, local, tokenizer, base):
    def publish(**changes):
        options = {
            "report": local.report,
            "attacks": local.attacks,
            "model": local.model,
            "processing_class": tokenizer,
            "base_model": BASE,
            "forget": ["Lima has been the capital of Peru ever since the Spanish came."],
            "api": hub_api,
        }
        options |= changes
        adapter, repo_id = options.pop("adapter", local.adapter), options.pop("repo_id", REPO)
        groups = {"details": CardDetails.pop_from(options), "options": PublishOptions.pop_from(options)}
        return publish_adapter(adapter, repo_id, **groups, **options)

    return publish


LOAD = """
import sys, torch
from elm_trainer.evaluation.report import read_report
from elm_trainer.hub.load import load_erased
from huggingface_hub import hf_hub_download
model, tokenizer = load_erased(sys.argv[1], verify=True)
logits = model(**tokenizer("The capital of Peru is", return_tensors="pt")).logits
report = read_report(hf_hub_download(sys.argv[1], "report.json"))
torch.save({"logits": logits.detach(), "report": report}, sys.argv[2])
"""


def test_another_process_with_a_fresh_cache_gets_the_same_logits_and_report_and_an_offline_one_loads_them(
    hub,
    local,
    tokenizer,
    publish,
    tmp_path,
):
    publish(staging_dir=tmp_path / "staged")

    environment = hub.env("hf_alice", tmp_path / "home")
    command = [sys.executable, "-c", LOAD, REPO, str(tmp_path / "loaded.pt")]
    subprocess.run(command, env=environment, check=True)
    asked = len(hub.requests)
    offline = (
        f"from elm_trainer.hub.load import load_erased; load_erased({REPO!r}, local_files_only=True, verify=True)"
    )
    subprocess.run([sys.executable, "-c", offline], env=environment | {"HF_HUB_OFFLINE": "1"}, check=True)

    assert len(hub.requests) == asked
    loaded = torch.load(tmp_path / "loaded.pt")
    with torch.no_grad():
        expected = local.model(**tokenizer("The capital of Peru is", return_tensors="pt")).logits
    assert torch.equal(loaded["logits"], expected)
    assert loaded["report"] == json.loads((tmp_path / "staged" / "report.json").read_text())
    assert loaded["report"]["figures"] == json.loads(json.dumps(local.report["figures"]))


def test_plain_peft_loads_it_too(hub, local, tokenizer, publish, tmp_path):
    publish()
    plain = (
        "import sys, torch; from peft import AutoPeftModelForCausalLM, PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({BASE!r}), {REPO!r})\n"
        f"auto = AutoPeftModelForCausalLM.from_pretrained({REPO!r})\n"
        f"ids = AutoTokenizer.from_pretrained({BASE!r})('The capital of Peru is', return_tensors='pt')\n"
        "torch.save([model(**ids).logits.detach(), auto(**ids).logits.detach()], sys.argv[1])\n"
    )

    command = [sys.executable, "-c", plain, str(tmp_path / "logits.pt")]
    subprocess.run(command, env=hub.env("hf_alice", tmp_path / "home"), check=True)

    with torch.no_grad():
        expected = local.model(**tokenizer("The capital of Peru is", return_tensors="pt")).logits
    assert all(torch.equal(logits, expected) for logits in torch.load(tmp_path / "logits.pt"))


def test_only_what_is_listed_goes_up_and_names_no_machine(hub, local, publish):
    publish()

    files = hub.files(REPO)
    assert set(files) - {".gitattributes"} <= PUBLISHED_FILES
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == (BASE, hub.head(BASE))
    assert json.loads(files["erasure.json"])["base_model"]["license"] == "apache-2.0"
    assert not [name for name, data in files.items() if b"jdoe" in data or b"hf_alice" in data]


def test_publishing_again_commits_nothing_and_keeps_what_a_person_wrote(hub, hub_api, publish):
    publish()
    card = hub.files(REPO)["README.md"].decode() + "\nAsk Ada about this one.\n"
    hub_api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=REPO)
    head = hub.head(REPO)

    publication = publish()

    assert not publication.changed and hub.head(REPO) == head
    assert "Ask Ada about this one." in hub.files(REPO)["README.md"].decode()


def test_a_dry_run_with_base_and_licence_given_asks_the_hub_nothing(hub, publish, tmp_path):
    revision = hub.head(BASE)
    asked = len(hub.requests)

    publication = publish(dry_run=True, staging_dir=tmp_path / "staged", base_revision=revision, license="apache-2.0")

    assert publication.commit is None and len(hub.requests) == asked
    assert (tmp_path / "staged" / "README.md").exists()


def test_a_data_set_is_named_only_where_anybody_may_see_it(hub, hub_api, local, publish, tmp_path):
    hub_api.create_repo("alice/open-texts", repo_type="dataset")
    hub_api.create_repo("alice/secret-texts", repo_type="dataset", private=True)
    sources = ["everyday", "alice/open-texts", "alice/secret-texts", "alice/no-texts"]
    report = local.report | {"recipe": local.report["recipe"] | {"retain": sources}}

    publish(report=report)

    recipe = json.loads(hub.files(REPO)["report.json"])["recipe"]
    assert recipe["retain"] == ["everyday", "alice/open-texts", "(private data set)", "(private data set)"]
    card = hub.files(REPO)["README.md"].decode()
    assert "- alice/open-texts\n" in card and "secret-texts" not in card and "not everybody may see" in card


def test_what_is_planted_in_the_card_is_stopped_before_the_repository_is_made(hub, publish, tmp_path):
    publish(dry_run=True, staging_dir=tmp_path / "staged")
    card = tmp_path / "staged" / "README.md"
    card.write_text(card.read_text() + "\nAs said: Lima has been the capital of Peru ever since the Spanish came.\n")

    with pytest.raises(ScanError, match=r"README.md:\d+"):
        publish(staging_dir=tmp_path / "staged")

    with pytest.raises(KeyError):
        hub.repo(REPO)


def test_a_finding_is_let_through_with_its_reason_which_goes_up(hub, publish, tmp_path):
    publish(dry_run=True, staging_dir=tmp_path / "staged")
    card = tmp_path / "staged" / "README.md"
    card.write_text(card.read_text() + "\nAsk ada.kovacs@acme.dev about it.\n")
    with pytest.raises(ScanError, match="an e-mail address") as caught:
        publish(staging_dir=tmp_path / "staged")
    [finding] = caught.value.findings

    publish(staging_dir=tmp_path / "staged", allow={finding.id: "the author's public address"})

    files = hub.files(REPO)
    assert b"ada.kovacs" in files["README.md"]
    assert json.loads(files["erasure.json"])["allowed"] == {finding.id: "the author's public address"}


def test_what_the_model_wrote_in_samples_is_masked_and_no_probe(hub, local, publish):
    report = json.loads(json.dumps(local.report))
    sample = report["samples"][0]
    sample["erased"] = "Write to mary.brown@acme.dev, or read /etc/passwd."

    publish(report=report)

    files = hub.files(REPO)
    assert json.loads(files["report.json"])["samples"][0]["erased"] == "Write to ▇▇▇, or read /etc/passwd."
    assert b"mary.brown" not in b"".join(data for name, data in files.items() if name.endswith((".json", ".md")))


def test_a_repository_that_holds_pickles_is_not_published_into(hub, hub_api, publish):
    hub_api.create_repo(REPO)
    hub_api.upload_file(path_or_fileobj=b"x", path_in_repo="adapter_model.bin", repo_id=REPO)
    head = hub.head(REPO)

    with pytest.raises(UnsafeAdapterError, match="adapter_model.bin"):
        publish()

    assert hub.head(REPO) == head


def test_an_adapter_that_changed_since_it_was_measured_is_refused(hub, local, publish, tmp_path):
    report = json.loads(json.dumps(local.report)) | {"erased_sha256": "0" * 64}

    with pytest.raises(ValueError, match="report"):
        publish(report=report)


def test_a_model_that_carries_other_weights_than_the_folder_is_refused(local, publish):
    weight = next(parameter for name, parameter in local.model.named_parameters() if "lora_B" in name)
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(1.0)
        with pytest.raises(ReloadError, match="save it again"):
            publish()
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert list(local.model.peft_config) == ["default"]


def test_a_base_on_the_hub_with_other_weights_is_refused(hub, hub_api, base, publish, tmp_path):
    with torch.no_grad():
        base.lm_head.weight.mul_(2)
    base.save_pretrained(tmp_path / "other")
    hub_api.upload_folder(repo_id=BASE, folder_path=tmp_path / "other")

    with pytest.raises(BaseMismatchError, match="`base_model` is 'alice/tiny-base'"):
        publish()


def test_a_base_from_a_path_needs_its_hub_id(publish):
    with pytest.raises(ValueError, match="`base_model` is None.*Hub id"):
        publish(base_model=None)


def test_a_base_without_licence_asks_for_one(hub, hub_api, publish):
    hub_api.upload_file(path_or_fileobj=b"No metadata.", path_in_repo="README.md", repo_id=BASE)

    with pytest.raises(ValueError, match="`license` is None"):
        publish()


def test_a_base_that_is_handed_in_comes_back_without_the_adapter(base, publish):
    before = list(dict(base.named_parameters()))

    publish(model=base, dry_run=False)

    assert list(dict(base.named_parameters())) == before


def test_what_the_environment_measured_is_the_environment_of_the_command(hub, local, base, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    local.model.save_pretrained(folder / "adapter")
    (folder / "erasure_run.json").write_text('{"method": "ElmTrainer"}')
    recipe = {"model": BASE, "dtype": "auto", "forget": ["capitals"], "seed": 0}
    (folder / "report.json").write_text(json.dumps(local.report | {"recipe": recipe}))
    command = [sys.executable, "examples/publish.py", "--adapter", str(folder / "adapter"), "--repo_id", REPO]

    printed = subprocess.run(
        [*command, "--staging_dir", str(tmp_path / "staged")],
        env=hub.env("hf_alice", tmp_path / "home"), capture_output=True, text=True,
    )  # fmt: skip

    assert printed.returncode == 0, printed.stderr
    assert "Published" in printed.stdout and hub.head(REPO)[:8] in re.sub(r"\s", "", printed.stdout)


def test_the_trainer_publishes_what_it_trained_with_the_report_beside_it(hub, hub_api, base, tokenizer, tmp_path):
    from peft import LoraConfig

    from elm_trainer import ConceptSources, build_erasure_dataset, evaluate_erasure
    from tests.hub.reports import _suite

    texts = ["The capital of Peru is a city on the coast, it is said."] * 4
    dataset = build_erasure_dataset({"capitals": ConceptSources(texts, [["Bread needs flour."]])}, size=4)
    output = tmp_path / "run"
    config = ElmConfig(
        str(output), max_steps=1, per_device_train_batch_size=2, bf16=False, gradient_checkpointing=False,
        report_to="none", save_strategy="no", push_to_hub=True, hub_strategy="end", hub_model_id="erased",
        hub_token="hf_alice",
    )  # fmt: skip
    trainer = ElmTrainer(base, config, train_dataset=dataset, processing_class=tokenizer, peft_config=LoraConfig(r=2))
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    assert not [
        request for request in hub.requests if request.path == "/api/repos/create" and "erased" in request.path
    ]
    with pytest.raises(ValueError, match="evidence"):
        trainer.push_to_hub()

    evaluate_erasure(
        trainer.model, None, _suite(), tokenizer, measures=["multiple-choice", "open-answers"], output_dir=output,
        details={"recipe": {"model": BASE, "seed": 0}},
    )  # fmt: skip
    publication = trainer.push_to_hub(base_model=BASE, forget=texts)

    assert publication.repo_id == REPO and hub.head(REPO) == publication.commit
    assert json.loads(hub.files(REPO)["erasure.json"])["method"] == "ElmTrainer"


def test_settings_as_arguments_of_their_own_still_work_and_say_where_they_go():
    keywords = {"license": "mit", "tag": "v1", "wrong": 1}

    with pytest.warns(DeprecationWarning, match=r"`license` .* deprecated.*`CardDetails\(license=…\)`"):
        details = CardDetails("org/name").with_keywords(keywords)
    with pytest.warns(DeprecationWarning, match=r"PublishOptions\(tag=…\)"):
        options = PublishOptions(revision="dev").with_keywords(keywords)

    assert details == CardDetails("org/name", license="mit")
    assert options == PublishOptions(revision="dev", tag="v1")
    assert keywords == {"wrong": 1}
    with pytest.raises(TypeError, match="no argument `wrong`"):
        publish_adapter("adapter", "alice/name", report={}, **keywords)


def test_checkpoints_are_never_pushed_unchecked(base, tokenizer, tmp_path):
    config = ElmConfig(str(tmp_path), push_to_hub=True, bf16=False)

    with pytest.raises(ValueError, match="`hub_strategy` is 'every_save'.*'end'"):
        ElmTrainer(base, config, processing_class=tokenizer)


def test_questions_of_ones_own_concept_are_asked_for_where_only_families_were(publish, local):
    # A bank that was made of documents alone has no plain questions.
    report = local.report | {"concepts": ["Varda"], "roles": {"Varda-cloze": "erased", "general": "far"}}
    with pytest.raises(ValueError, match=r"`questions` is None, and the banks \['Varda'\] are not built in: .*--bank"):
        publish(report=report, questions=None)
