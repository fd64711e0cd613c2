import copy
import dataclasses
import json
import time
import tracemalloc
from typing import get_args

import pytest
import transformers
from trl import SFTConfig

from elm_trainer import compare_reports, read_report
from elm_trainer.attacks.report import plot_attacks
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.tables import plot_report, write_markdown
from elm_trainer.files import write_json
from elm_trainer.fitting import OBJECTIVES
from elm_trainer.hub.card import make_card
from elm_trainer.hub.published_report import ALWAYS, LOCAL_FILE, PRIVATE_DATASET, published_report

from ..methods.methods import METHODS
from .reports import BASE


def publish(report, recipe=None, **settings):
    public = {"public_sources": {"org/retain-texts", "org/texts"}}
    report = report if recipe is None else report | {"recipe": recipe}
    return published_report(report, **{"base_model": BASE, "method": "ElmTrainer"} | public | settings)


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


def _other(field):
    """A value of a field's kind that is not its default."""
    if field.metadata.get("choices"):
        return next(choice for choice in field.metadata["choices"] if choice != field.default)
    kinds = set(get_args(field.type)) or {field.type}
    for kind, value in ((bool, not field.default), (int, 7), (float, 0.37)):
        if kind in kinds:
            return value
    texts = {
        "concepts": ["capitals"], "layers": [3, 5], "state_layers": [2, 4], "target_module": "mlp.down_proj", "anchors": ["capitals"],
        "retain_loss": "kl", "preset": "released", "target_dtype": "float32",
    }  # fmt: skip
    return texts[field.name]


@pytest.mark.parametrize("name", METHODS)
def test_a_published_recipe_gives_back_every_setting_of_any_method(report, name):
    own = [f for f in dataclasses.fields(METHODS[name].config) if f.name not in SFTConfig.__dataclass_fields__]
    own += [METHODS[name].config.__dataclass_fields__[field] for field in ALWAYS]
    defaults = {field.name: getattr(field.default, "value", field.default) for field in own}
    defaults = {field: value for field, value in defaults.items() if value not in (None, dataclasses.MISSING)}
    others = {field.name: _other(field) for field in own if field.name not in ("targets_dir", "lr_scheduler_type")}
    for settings in (defaults, others):
        recipe = publish(report, recipe={"seed": 0, "forget": ["capitals"], **settings})["recipe"]
        assert {field: recipe.get(field) for field in settings} == settings


def test_the_settings_of_the_example_script_are_all_published(report):
    settings = {
        "dtype": "bfloat16", "attn_implementation": "sdpa", "matmul_precision": "medium", "forget": ["elements"],
        "retain": ["everyday", "org/texts"], "own_retain": True, "characters": "51-700", "synthetic": ["capitals-fluent", "none"], "synthetic_size": 5, "dataset_size": 9,
        "lora_rank": 8, "lora_alpha": 4, "lora_dropout": 0.1, "lora_layers": "4-7", "lora_targets": "q_proj,mlp.down_proj",
        "evaluate": False, "bank": ["none"], "questions": 30, "measures": ["cloze", "inside"], "dev_every": 3, "dev_stop": 0.3,
        "keep_best": True, "documents": ["org/texts"], "near": ["everyday"],
        "optim": "adafactor", "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.5},
        "model_init_kwargs": {"dtype": "float32"}, "max_length": 77, "warmup_steps": 3, "seed": 3, "bf16": False,
    }  # fmt: skip
    recipe = publish(report, recipe=settings)["recipe"]
    assert {name: recipe.get(name) for name in settings} == settings


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_is_published(report, objective):
    recipe = publish(report, recipe={"seed": 0, "forget": ["capitals"], "objective": objective})["recipe"]
    assert recipe["objective"] == objective


def test_of_what_texts_were_made_from_goes_up_what_anybody_may_see(report, caplog):
    made = {
        "concept": "capitals: Oslo SENT",
        "documents": ["SENT/notes"],
        "facts": "./SENT.csv",
        "resume": True,
        "seed": 0,
    }
    recipe = publish(report, recipe=made)["recipe"]
    assert recipe["concept"] == "capitals" and "SENT" not in str(recipe) and "resume" not in recipe
    assert {recipe["facts"], *recipe["documents"]} <= {
        LOCAL_FILE,
        PRIVATE_DATASET,
    } and "not published" not in caplog.text


PLANTED = {
    "output_dir": "/srv/SENT", "logging_dir": "SENT-logs", "run_name": "SENT-run", "report_to": ["SENT"], "project": "SENT",
    "hub_model_id": "bob/SENT", "hub_token": "SENT", "trackio_space_id": "SENT/x", "api_key": "SENT", "password": "SENT",
    "wandb_entity": "SENT-corp", "wandb_project": "SENT", "note": "ask SENT", "credentials": "SENT", "auth": "Bearer SENT",
    "dataset_kwargs": {"storage_options": {"key": "SENT", "secret": "SENT"}, "SENT": True},
    "model_init_kwargs": {"token": "SENT", "cache_dir": "SENT", "dtype": "SENT", "attn_implementation": "SENT/kernel"},
    "chat_template_path": "C:\\Users\\bob\\SENT.jinja", "data_root": "//server/share/SENT", "cloud": "s3://SENT/x",
    "forget": ["SENT-customers.parquet", "SENT", "data/SENT/", "$HOME/SENT", "gs://SENT/x", "SENT/x/y", "~/SENT"],
    "retain": "SENT", "synthetic": [{"SENT": 1}], "bank": ["./SENT"], "anchors": ["SENT"], "rel": "SENT/texts", "SENTname": 1,
    "sentinel_SENT": {"a": [{"b": "SENT"}]}, "env": "HF_TOKEN: SENT", "hostname": "SENT.corp.internal", "optim": "SENT",
    "optim_args": "key=SENT", "optim_target_modules": ["a b SENT"], "lr_scheduler_type": "SENT", "learning_rate": "SENT",
    "lr_scheduler_kwargs": {"SENT": 1, "num_cycles": "SENT"}, "seed_of": {"SENT"}, "eta": ["SENT"], "preset": "SENT",
    "lora_targets": "SENT of q_proj; v", "lora_layers": "SENT", "measures": ["SENT"], "concepts": ["SENT"], "layers": ["SENT"],
    "packing_strategy": "SENT", "loss_type": "SENT", "truncation_mode": "SENT", "max_length": {"SENT": 1}, "gguf_file": "SENT",
    "model": "SENT", "model_revision": "SENT", "dtype": "SENT", "attn_implementation": "SENT", "eval_strategy": "SENT",
    "gradient_checkpointing_kwargs": {"context_fn": "SENT"}, "liger_kernel_config": {"SENT": True}, "fsdp_config": {"SENT": 1},
    "metric_for_best_model": "SENT", "include_for_metrics": ["SENT"], "label_names": ["SENT"], "torch_compile_backend": "SENT",
    "targets_dir": "SENT", "accelerator_config": {"SENT": "SENT"}, "deepspeed": "SENT.json", "dataset_text_field": "SENT",
}  # fmt: skip


@pytest.mark.parametrize("key", ["forget", "retain", "synthetic", "bank", "anchors"])
def test_of_a_data_set_of_the_hub_that_is_not_public_the_kind_alone_is_published(report, key):
    recipe = {"seed": 0, "forget": ["capitals"], key: ["org/texts", "SENT-corp/private-dataset", "none"]}
    assert publish(report, recipe=recipe)["recipe"][key] == ["org/texts", "(private data set)", "none"]
    assert publish(report, recipe=recipe, public_sources=())["recipe"][key][0] == "(private data set)"


@pytest.mark.parametrize("flag", ["eval_on_start", "group_by_length", "packing", "tf32"])
def test_a_flag_of_trls_config_says_nothing_of_anybody_and_is_published(report, flag):
    if flag in SFTConfig.__dataclass_fields__:
        recipe = {"seed": 0, "forget": ["capitals"], flag: True}
        assert publish(report, recipe=recipe)["recipe"][flag] is True
        assert flag not in publish(report, recipe=recipe | {flag: "SENT"})["recipe"]


@pytest.mark.parametrize("name", PLANTED)
def test_nothing_that_is_planted_in_a_recipe_is_published(report, name):
    recipe = {"seed": 0, "forget": ["capitals"], name: PLANTED[name]}
    assert "SENT" not in json.dumps(publish(report, recipe=recipe)["recipe"])


def test_what_is_left_out_of_a_recipe_is_told_by_its_name_alone(report, caplog):
    transformers.utils.logging.enable_propagation()
    recipe = {
        "seed": 0,
        "forget": ["capitals"],
        "my_knob": "SENT",
        "dataset_kwargs": {"x": "SENT"},
        "run_name": "mine",
    }
    publish(report, recipe=recipe)
    [told] = [record.message for record in caplog.records if "not published" in record.message]
    assert told.endswith(": dataset_kwargs, my_knob.") and "SENT" not in told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**30, 4111_1111_1111_1111_1111])
def test_a_number_that_is_no_setting_is_not_published(report, value):
    assert "eta" not in publish(report, recipe={"seed": 0, "forget": ["capitals"], "eta": value})["recipe"]


def test_the_numbers_that_a_method_of_ones_own_declares_are_published(report):
    @dataclasses.dataclass
    class OwnConfig(SFTConfig):
        own_strength: float = 0.5
        own_note: str = "x"

    recipe = publish(report, recipe={"seed": 0, "forget": ["capitals"], "own_strength": 0.7, "own_note": "SENT"})[
        "recipe"
    ]
    assert recipe["own_strength"] == 0.7 and "own_note" not in recipe


def test_texts_in_the_training_log_stay_here(report):
    report["training_log"] = [{"step": 1, "loss": 2.5, "host": "SENT"}]
    assert publish(report)["training_log"] == [{"step": 1, "loss": 2.5}]


def test_a_report_of_20000_questions_is_published_and_carded_in_little_time_and_memory(report, tmp_path):
    sides = {side: {"values": [0.0, 1.0] * 10_000, "counts": [1, 1] * 10_000} for side in ("reference", "erased")}
    report["items"] = {f"multiple_choice.capitals.{rule}": sides for rule in ("pmi", "log_likelihood", "normalized")}
    sample = {
        "role": "erased",
        "prompt": "What is it?",
        "answer": "Lima",
        "reference": "It is Lima.",
        "erased": "Nothing.",
    }
    report["samples"] = [
        sample | {"role": role, "prompt": f"What is {n}?"} for n in range(10_000) for role in ("erased", "far")
    ]
    started = time.perf_counter()
    tracemalloc.start()

    published = publish(report)
    card = str(make_card(published, "alice/large"))

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    write_json(tmp_path / "report.json", published)
    assert time.perf_counter() - started < 20 and peak < 200e6
    assert len(card) < 200_000 and "9900 more stand in `report.json`." in card
    assert (tmp_path / "report.json").stat().st_size < 10_000_000


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


def test_a_recipe_without_a_seed_is_refused(report):
    del report["recipe"]
    with pytest.raises(ValueError, match="`recipe` has no `seed`.*pass its settings"):
        publish(report)


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
