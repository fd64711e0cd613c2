import copy
import dataclasses
import json

import pytest
from trl import SFTConfig

from elm_trainer import compare_reports, read_report
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.plots import plot_attacks, plot_report
from elm_trainer.evaluation.report import write_json
from elm_trainer.evaluation.tables import write_markdown
from elm_trainer.hub.published_report import ALWAYS, published_report

from ..methods.methods import METHODS
from .reports import BASE, RECIPE


def publish(report, **settings):
    return published_report(report, **{"base_model": BASE, "method": "ElmTrainer"} | settings)


@pytest.fixture
def report(local):
    return copy.deepcopy(local.report)


def test_it_says_what_was_erased_from_what_and_how(report):
    published = publish(report)
    assert published["concepts"] == ["capitals"] and published["method"] == "ElmTrainer"
    assert published["base_model"]["id"] == "org/tiny-base" and published["attacks"] is None
    for key in ("figures", "verdict", "flags", "roles", "items", "training_log", "versions", "erased_sha256"):
        assert published[key] == report[key], key


def test_it_is_still_a_report(report, local, tmp_path):
    write_json(tmp_path / "report.json", publish(report, attacks=local.attacks))
    published = read_report(tmp_path / "report.json")
    compared = compare_reports(report, published)
    assert {figure["change"]["value"] for figure in compared.values()} <= {0.0, 1.0}
    write_markdown(tmp_path / "report.md", published)
    write_markdown(tmp_path / "local.md", report)
    assert (tmp_path / "report.md").read_text() == (tmp_path / "local.md").read_text()
    plot_report(published, tmp_path / "report.png")
    plot_attacks(published["attacks"], tmp_path / "attacks.png")
    assert (tmp_path / "report.png").stat().st_size > 1000 < (tmp_path / "attacks.png").stat().st_size


def test_unknown_keys_stay_here(report):
    report["notes"] = "for me alone"
    report["items"]["open_answers.capitals"]["erased"]["texts"] = ["for me alone"]
    assert "for me alone" not in json.dumps(publish(report))


def test_the_recipe_repeats_the_run_and_names_nothing_of_the_machine(report):
    assert publish(report)["recipe"] == {
        "model": "org/tiny-base",
        "model_revision": BASE.revision,
        "forget": ["capitals", "(local file)"],
        "retain": ["everyday", "org/retain-texts"],
        "lora_rank": 4,
        "lora_targets": "all-linear",
        "output_dir": "outputs/capitals",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "eta": 1.5,
        "preset": "paper",
        "seed": 7,
    }


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("changed", [False, True])
def test_a_published_recipe_gives_back_every_setting_of_any_method(report, name, changed):
    config_class = METHODS[name].config
    own = {f.name: f.default for f in dataclasses.fields(config_class) if f.name not in SFTConfig.__dataclass_fields__}
    own = {field: value for field, value in own.items() if isinstance(value, (int, float))}
    settings = {field: value + 1 if changed and type(value) is not bool else value for field, value in own.items()}
    settings |= {"learning_rate": config_class.__dataclass_fields__["learning_rate"].default}
    recipe = publish(report, recipe={"seed": 0, "forget": ["capitals"], **settings})["recipe"]
    assert {field: recipe.get(field) for field in settings} == settings


def test_methods_change_no_other_default_of_trl_than_those_that_are_always_published():
    for method in METHODS.values():
        theirs, ours = (config.__dataclass_fields__ for config in (SFTConfig, method.config))
        changed = {name for name in theirs if ours[name].default != theirs[name].default}
        assert changed <= set(ALWAYS)


def test_nothing_of_the_machine_is_left_anywhere(report, local):
    report["datasets"]["bank capitals"]["revision"] = "/home/jdoe/banks/capitals.yaml"
    attacks = copy.deepcopy(local.attacks)
    attacks["attacks"][1]["settings"]["text"] = "C:\\Users\\jdoe\\texts.txt"
    attacks["host"] = "jdoe-laptop"
    published = json.dumps(publish(report, attacks=attacks))
    assert "jdoe" not in published and "hub_token" not in published and "<EOS_TOKEN>" not in published


def test_an_attack_keeps_its_numbers_and_not_its_words(report, local):
    attacks = copy.deepcopy(local.attacks)
    attacks["attacks"][-1]["details"] = {"gcg.10.pmi": {"suffix": " Lima ! !", "best_loss": 5.2}}
    published = publish(report, attacks=attacks)["attacks"]
    assert published["attacks"][-1]["details"] == {"gcg.10.pmi": {"best_loss": 5.2}}
    for key in ("figures", "worst_case", "families", "curves", "chance", "skipped", "erased_sha256"):
        assert published[key] == attacks[key], key


@pytest.mark.parametrize(
    ("answer", "said", "expected"),
    [
        ("Lomé", "It is Lomé, by the sea.", "It is ▇▇▇, by the sea."),
        ("Lomé", "LOME! Lome\u0301? lomé.", "▇▇▇! ▇▇▇? ▇▇▇."),
        ("Port-au-Prince", "Port au\nPrince", "▇▇▇"),
        ("N'Djamena", "N’Djamena or Ndjamena", "▇▇▇ or ▇▇▇"),
        ("Washington D.C.", "Washington, D.C. is in D.C.", "▇▇▇. is in D.C."),
        ("Lima", "Limassol and climate", "Limassol and climate"),
        ("He", "He is He; the helium", "▇▇▇ is ▇▇▇; the helium"),
        ("He", "where he is", "where he is"),
        ("東京", "首都は 東京 です", "首都は ▇▇▇ です"),
        ("Kyiv", "Once called Kiev, now Kyiv", "Once called ▇▇▇, now ▇▇▇"),
    ],
)
def test_the_right_answer_is_masked_however_it_is_written(report, answer, said, expected):
    report["samples"][0] |= {"answer": answer, "reference": said, "erased": "Some other town"}
    questions = [Question("What?", ("Kyiv", "Lviv"), "Kyiv", aliases=("Kiev",))]
    sample = publish(report, questions=questions)["samples"][0]
    assert sample == {
        "role": "erased", "prompt": "What is the capital of Peru?", "reference": expected, "erased": "Some other town",
    }  # fmt: skip


def test_what_is_to_be_kept_is_not_masked(report):
    report["samples"][0] |= {"role": "near", "answer": "Nile", "erased": "It is the Nile."}
    sample = publish(report)["samples"][0]
    assert sample["erased"] == "It is the Nile." and "answer" not in sample


def test_wrong_answers_are_left_to_be_read(report):
    report["samples"][0]["erased"] = "It is Lomé."
    assert publish(report)["samples"][0]["erased"] == "It is Lomé."


def test_another_recipe_can_stand_in(report):
    del report["recipe"]
    with pytest.raises(ValueError, match="`recipe` has no `seed`.*pass its settings"):
        publish(report)
    assert publish(report, recipe=RECIPE | {"seed": 3})["recipe"]["seed"] == 3


def test_a_default_of_trl_that_is_none_of_the_methods_is_kept(report):
    report["recipe"]["learning_rate"] = 2e-5
    assert publish(report)["recipe"]["learning_rate"] == 2e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "The report has schema_version 1.*measure again"),
        ({"kind": "gold-standard"}, "is of the kind 'gold-standard', not 'evaluation'"),
        ({"roles": {"geography": "near"}, "recipe": {"seed": 0}}, "names nothing that was erased"),
    ],
)
def test_another_kind_of_report_is_refused(report, change, message):
    with pytest.raises(ValueError, match=message):
        publish(report | change)


@pytest.mark.parametrize("key", ["reference_sha256", "erased_sha256"])
def test_attacks_on_another_model_are_refused(report, local, key):
    other = local.attacks | {key: "f" * 64}
    with pytest.raises(ValueError, match=rf"`{key}` is ffffffffffff there and {report[key][:12]}"):
        publish(report, attacks=other)


def test_an_evaluation_is_no_attack_report(report):
    with pytest.raises(ValueError, match="The attack report is of the kind 'evaluation', not 'attacks'"):
        publish(report, attacks=report)
