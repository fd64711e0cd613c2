import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from elm_trainer.data.invented import CONCEPT, RETAINED
from elm_trainer.evaluation.report import read_report
from elm_trainer.files import UNFINISHED
from elm_trainer.gold_standard import (
    SPLITS,
    GoldStandardConfig,
    compare_relearning,
    gold_standard,
    mean_by_subject,
    plot_gold_standard,
    steps_to,
)
from elm_trainer.gold_standard import models as gold_models
from elm_trainer.gold_standard.models import MODELS, GoldModels, GradientAscentTrainer


TINY = GoldStandardConfig(
    facts=8,
    prose=20,
    layers=1,
    width=32,
    steps=2,
    batch_size=8,
    elm={"expert_steps": 1, "novice_steps": 1, "top_k": 10, "consistency_weight": 0.0, "max_steps": 1},
    ascent={"max_steps": 1},
    lora_rank=2,
    relearning_steps=[1, 2],
)


@pytest.fixture
def made(monkeypatch):
    """Names of the models that are trained, in order."""
    names = []
    make = GoldModels._make

    def counted(self, name):
        names.append(name)
        return make(self, name)

    monkeypatch.setattr(GoldModels, "_make", counted)
    return names


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gold")
    return folder, gold_standard(TINY, output_dir=folder)


def test_the_report_is_whole(tiny_run):
    folder, report = tiny_run
    assert report == read_report(folder / "gold_standard.json", "gold-standard")
    assert report["kind"] == "gold-standard" and sorted(report["ordering"]) == sorted(MODELS)
    expected = {f"accuracy.{kind}" for kind in (CONCEPT, *RETAINED, "retained")}
    expected |= {"open_answers.concept", "r_ppl.taught", "r_ppl.never-taught", "perplexity.prose", "forget_quality"}
    assert expected <= set(report["figures"])
    for name, figures in report["figures"].items():
        assert set(figures) == set(MODELS), name
        for figure in figures.values():
            assert set(figure) == {"value", "low", "high", "n"} and all(map(math.isfinite, figure.values()))
    for split in SPLITS:
        assert {name: [row[0] for row in curve] for name, curve in report["curves"][split].items()} == {
            name: [0, 1, 2] for name in MODELS
        }
        assert report["relearning"][split]["models"]["never-taught"]["ratio"]["value"] == 1
    assert report["figures"]["forget_quality"]["never-taught"]["value"] == 1


def test_a_curve_starts_from_the_plain_accuracy(tiny_run):
    _, report = tiny_run
    for name in MODELS:
        assert report["curves"]["all"][name][0][1] == pytest.approx(
            report["figures"]["accuracy.keepers"][name]["value"]
        )


def test_a_second_call_only_reads(tiny_run, made, monkeypatch):
    folder, report = tiny_run
    monkeypatch.setattr(gold_models.Trainer, "train", lambda self: pytest.fail("trained again"))
    assert gold_standard(TINY, output_dir=folder) == report
    assert made == []


def test_other_settings_of_the_attack_train_no_model_again(tiny_run, made):
    folder, report = tiny_run
    again = gold_standard(replace(TINY, relearning_steps=[1]), output_dir=folder)
    assert made == []
    assert again["figures"] == report["figures"]
    assert gold_standard(TINY, output_dir=folder)["curves"] == report["curves"]


def test_other_settings_of_a_method_train_its_model_only(tiny_run, made):
    folder, _ = tiny_run
    models = GoldModels(replace(TINY, ascent={"max_steps": 2}), folder / "models")
    for name in MODELS:
        models.load(name)
    assert made == ["gradient-ascent"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", None])
def test_a_damaged_model_is_made_again(name, tiny_run, made):
    [sums] = (tiny_run[0] / "models").glob("never-taught-*.sha256.json")
    path = sums if name is None else sums.parent / sums.name.removesuffix(".sha256.json") / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    GoldModels(TINY, tiny_run[0] / "models").load("never-taught")
    GoldModels(TINY, tiny_run[0] / "models").load("never-taught")
    assert made == ["never-taught"]


def test_a_killed_run_leaves_no_half_model_and_goes_on(tmp_path, made, monkeypatch):
    class Killed(BaseException):
        pass

    save = gold_models.LlamaForCausalLM.save_pretrained

    def die_half_way(self, path, **options):
        save(self, path, **options)
        (path / "model.safetensors").write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(gold_models.LlamaForCausalLM, "save_pretrained", die_half_way)
        with pytest.raises(Killed):
            gold_standard(TINY, output_dir=tmp_path)
    assert not list((tmp_path / "models").glob("taught-*"))
    report = gold_standard(TINY, output_dir=tmp_path)
    assert made == ["taught", *MODELS]
    assert sorted(report["ordering"]) == sorted(MODELS)
    assert not list((tmp_path / "models").glob(f"{UNFINISHED}*")) and not list(tmp_path.glob("*.jsonl"))


def test_both_models_start_alike_and_read_in_the_same_order(tmp_path, monkeypatch):
    models = GoldModels(TINY, tmp_path)
    seen = []

    def record(model, processing_class, texts, **settings):
        seen.append((model.state_dict(), texts, settings))

    monkeypatch.setattr(gold_models, "fine_tune", record)
    for name in ("taught", "never-taught"):
        models._make(name)
    (first, texts, settings), (second, other_texts, other_settings) = seen
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert settings == other_settings and len(texts) == len(other_texts)


def test_a_name_is_one_token_wherever_it_stands(tmp_path):
    models = GoldModels(TINY, tmp_path)
    tokenizer = models.processing_class
    for fact in models.world.facts[CONCEPT]:
        [inside] = tokenizer(f" {fact.answer}")["input_ids"]
        assert tokenizer(f"{fact.answer} keeps it.")["input_ids"][0] == inside
        assert tokenizer(f"Answer: {fact.answer}")["input_ids"][-1] == inside


def test_gradient_ascent_raises_the_loss_of_forget_text_above_that_of_retain_text(tmp_path, monkeypatch):
    losses = []
    weigh = GradientAscentTrainer.weigh

    def record(self, terms, weights):
        losses.append({name: value.item() for name, value in terms.items()})
        loss = weigh(self, terms, weights)
        assert loss.item() == pytest.approx(losses[-1]["retain"] - losses[-1]["forget"], abs=1e-5)
        return loss

    monkeypatch.setattr(GradientAscentTrainer, "weigh", record)
    ascent = {"max_steps": 40, "learning_rate": 1e-2}
    config = replace(TINY, steps=40, learning_rate=1e-2, ascent=ascent, lora_rank=8)
    GoldModels(config, tmp_path).load("gradient-ascent")
    gaps = [loss["forget"] - loss["retain"] for loss in losses]
    assert len(gaps) == 40 and sum(gaps[-5:]) / 5 > sum(gaps[:5]) / 5 + 0.5
    assert losses[-1]["forget"] > losses[0]["forget"] + 0.5


def test_steps_to_a_goal_are_linear_between_points():
    steps = np.array([0.0, 10.0, 30.0])
    assert steps_to(0.5, steps, np.array([0.25, 0.35, 0.65])) == pytest.approx(20)
    assert steps_to(0.5, steps, np.array([0.6, 0.1, 0.9])) == 0
    assert math.isnan(steps_to(0.5, steps, np.array([0.2, 0.3, 0.4])))


def test_a_model_that_learns_twice_as_fast_has_the_ratio_two():
    steps = [0, 10, 20, 40]

    def curve(values):
        return {"steps": steps, "rights": [[value] * 6 for value in values]}

    results = {
        "taught": curve([1, 1, 1, 1]),
        "never-taught": curve([0.25, 0.25, 0.625, 1]),
        "fast": curve([0.25, 0.625, 1, 1]),
        "stuck": curve([0.25, 0.25, 0.25, 0.25]),
    }
    curves, comparison = compare_relearning(results)
    assert comparison["goal"] == 0.625
    models = comparison["models"]
    assert models["fast"]["steps"]["value"] == 10 and models["fast"]["ratio"] == {
        "value": 2.0, "low": 2.0, "high": 2.0, "n": 6
    }  # fmt: skip
    assert (models["stuck"]["reached"], models["stuck"]["censored"]) == (False, 1.0)
    assert models["stuck"]["steps"]["value"] == 40
    assert models["taught"]["steps"]["value"] == 1
    # Trapezia of the never-taught curve: 10·.25 + 10·.4375 + 20·.8125 = 23.125 over 40 steps.
    assert models["never-taught"]["area"]["value"] == pytest.approx(23.125 / 40)
    assert models["never-taught"]["area_difference"]["value"] == 0
    assert comparison["ordering"] == ["stuck", "never-taught", "fast", "taught"]
    assert curves["fast"][1] == [10, 0.625, 0.625, 0.625]


def test_the_interval_of_a_ratio_holds_it_and_widens_with_the_spread_of_subjects():
    rng = np.random.default_rng(0)

    def results(spread):
        def curve(values):
            return [np.clip(value + spread * rng.standard_normal(24), 0, 1).tolist() for value in values]

        return {
            "taught": {"steps": [0, 10, 20], "rights": curve([1, 1, 1])},
            "never-taught": {"steps": [0, 10, 20], "rights": curve([0.25, 0.5, 1])},
        } | {"other": {"steps": [0, 10, 20], "rights": curve([0.25, 0.7, 1])}}

    ratios = [compare_relearning(results(spread))[1]["models"]["other"]["ratio"] for spread in (0.02, 0.2)]
    assert all(ratio["low"] < ratio["value"] < ratio["high"] for ratio in ratios)
    assert ratios[0]["high"] - ratios[0]["low"] < ratios[1]["high"] - ratios[1]["low"]


def test_the_phrasings_of_a_fact_are_one_item(tmp_path):
    questions = GoldModels(TINY, tmp_path).world.questions[CONCEPT]
    values = [float(index % 4 == 0) for index in range(len(questions))]
    assert len(questions) == 4 * 8 and mean_by_subject(questions, values) == [0.25] * 8


def test_the_picture_is_drawn_from_the_report_alone(tiny_run, tmp_path):
    folder, _ = tiny_run
    path = tmp_path / "gold.png"
    plot_gold_standard(json.loads((folder / "gold_standard.json").read_text()), path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relearning_steps": []}, r"`relearning_steps` is \[\]"),
        ({"relearning_steps": [0, 2]}, r"`relearning_steps` is \[0, 2\]"),
        ({"steps": 0}, "`steps` is 0: it must be at least 1"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        GoldStandardConfig(**fields)


@pytest.mark.slow
def test_the_gold_standard_holds_at_half_its_depth(tmp_path):
    # Half of the layers learn as much and take half the time, and two points of the curves are enough. By step 70 some processors
    # are not there yet.
    report = gold_standard(GoldStandardConfig(layers=2, steps=800, relearning_steps=[40, 120]), output_dir=tmp_path)
    accuracy = {name: figure["value"] for name, figure in report["figures"]["accuracy.keepers"].items()}
    retained = {name: figure["value"] for name, figure in report["figures"]["accuracy.retained"].items()}
    assert accuracy["taught"] >= 0.9
    # With 24 facts, chance itself has a standard error of .07.
    assert accuracy["never-taught"] == pytest.approx(report["chance"], abs=0.14)
    assert accuracy["erased"] < accuracy["taught"] - 0.4
    assert retained["erased"] == pytest.approx(retained["taught"], abs=0.1)
    assert report["figures"]["open_answers.concept"]["never-taught"]["value"] < 0.15
    assert sorted(report["ordering"]) == sorted(MODELS)
    assert report["relearning"]["all"]["models"]["never-taught"]["reached"]
