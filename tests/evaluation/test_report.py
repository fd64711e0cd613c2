import io
import json

import pytest
import torch
from rich.console import Console

from elm_trainer.data.questions import load_bank
from elm_trainer.evaluation.plots import plot_report
from elm_trainer.evaluation.report import (
    EvaluationSuite,
    OpenQuestion,
    dataset_info,
    measure,
    model_fingerprint,
    read_report,
    render_table,
    write_report,
    write_samples,
)


OPEN = [OpenQuestion("What is the capital of Peru?", "Lima"), OpenQuestion("What is the capital of Togo?", "Lomé")]
LOG = [
    {"step": 1, "erase_loss": 3.0, "retain_loss": 0.5, "consistency_loss": 2.0},
    {"step": 2, "erase_loss": 2.0, "retain_loss": 0.4, "consistency_loss": 1.5},
    {"step": 2, "train_runtime": 1.0},
]


@pytest.fixture
def suite():
    return EvaluationSuite(
        banks={"capitals": load_bank("capitals")[:6], "general": load_bank("general")[:6]},
        erased=("capitals",),
        open_questions=OPEN,
        concept_prompts=["Tell me about Oslo.", "Write a line about Lima."],
        retain_texts=["Bread needs flour.", "The cat sat on the mat."],
        max_new_tokens=4,
    )


@pytest.fixture
def report(tiny_peft_model, tokenizer, suite, tmp_path):
    return write_report(
        tmp_path / "report.json",
        measure(tiny_peft_model, tokenizer, suite),
        model=tiny_peft_model,
        recipe={"seed": 7},
        datasets={"retain": dataset_info(suite.retain_texts)},
        seconds={"total": 1.23},
        training_log=LOG,
    )


def adapt(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)


def test_an_untouched_adapter_measures_as_its_reference(tiny_peft_model, tokenizer, suite):
    measurement = measure(tiny_peft_model, tokenizer, suite)

    for name, sides in measurement["figures"].items():
        assert sides["erased"] == pytest.approx(sides["reference"]), name
    assert measurement["figures"]["retention.kl"]["erased"]["value"] == 0
    assert all(sample["reference"] == sample["erased"] for sample in measurement["samples"])


def test_every_figure_has_a_count_and_an_interval_on_both_sides(report):
    expected = {
        f"multiple_choice.{bank}.{rule}" for bank in ("capitals", "general") for rule in ("pmi", "log_likelihood")
    }
    expected |= {f"fluency.{name}" for name in ("r_ppl", "repetition", "distinct_2", "empty")}
    expected |= {"open_answers.names_answer", "retention.perplexity", "retention.kl"}

    assert set(report["figures"]) == expected
    for sides in report["figures"].values():
        assert set(sides) == {"reference", "erased"}
        for figure in sides.values():
            assert figure["n"] > 0
            assert figure["low"] <= figure["value"] <= figure["high"]


def test_a_working_adapter_moves_the_erased_side_only(tiny_peft_model, tokenizer, suite):
    before = measure(tiny_peft_model, tokenizer, suite)["figures"]
    adapt(tiny_peft_model)
    after = measure(tiny_peft_model, tokenizer, suite)["figures"]

    assert all(after[name]["reference"] == pytest.approx(before[name]["reference"]) for name in before)
    assert after["retention.kl"]["erased"]["value"] > 0.01
    assert after["retention.perplexity"]["erased"] != after["retention.perplexity"]["reference"]


@pytest.mark.parametrize(
    ("answer", "named"),
    [("It is LIMA.", True), ("lome", False), ("Lima", True), ("", False), ("It is Lyma", False)],
)
def test_an_answer_names_the_truth_whatever_its_case(tiny_peft_model, tokenizer, suite, monkeypatch, answer, named):
    monkeypatch.setattr(
        "elm_trainer.evaluation.report.generate", lambda *args, **options: [answer or " "] * len(args[2])
    )
    suite.open_questions = OPEN[:1]

    figures = measure(tiny_peft_model, tokenizer, suite)["figures"]

    assert figures["open_answers.names_answer"]["erased"]["value"] == named


def test_an_answer_names_the_truth_whatever_its_accents(tiny_peft_model, tokenizer, suite, monkeypatch):
    monkeypatch.setattr(
        "elm_trainer.evaluation.report.generate", lambda *args, **options: ["LOME it is"] * len(args[2])
    )
    suite.open_questions = OPEN[1:]

    figures = measure(tiny_peft_model, tokenizer, suite)["figures"]

    assert figures["open_answers.names_answer"]["erased"]["value"] == 1


def test_the_samples_are_the_first_open_questions(tiny_peft_model, tokenizer, suite):
    suite.open_questions = OPEN * 6

    samples = measure(tiny_peft_model, tokenizer, suite)["samples"]

    assert [sample["prompt"] for sample in samples] == [item.question for item in (OPEN * 6)[:10]]


def test_a_report_is_read_back_as_it_was_written(report, tmp_path):
    assert read_report(tmp_path / "report.json") == json.loads(json.dumps(report))
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_report_tells_how_it_was_made(report):
    assert report["schema_version"] == 1
    assert report["recipe"] == {"seed": 7}
    assert report["datasets"]["retain"]["size"] == 2
    assert report["seconds"] == {"total": 1.2}
    assert report["peak_memory_bytes"] > 50e6
    assert report["training_log"] == LOG
    assert {"torch", "transformers", "trl", "peft"} <= set(report["versions"])


def test_a_report_of_another_schema_is_refused_by_name(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"schema_version": 99}))

    with pytest.raises(ValueError, match=r"old\.json has schema_version 99, but this version reads 1"):
        read_report(path)


def test_a_failed_write_leaves_the_earlier_report(tiny_peft_model, tmp_path):
    path = tmp_path / "report.json"
    path.write_text("earlier")

    with pytest.raises(TypeError):
        write_report(path, {"figures": object()}, model=tiny_peft_model, recipe={}, datasets={}, seconds={})

    assert path.read_text() == "earlier"


def test_the_fingerprint_is_that_of_the_base_with_and_without_an_adapter(tiny_model):
    from peft import LoraConfig, get_peft_model

    bare = model_fingerprint(tiny_model)
    wrapped = get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear"))
    adapt(wrapped)

    assert model_fingerprint(wrapped) == bare


def test_the_fingerprint_tells_other_weights_apart(tiny_model):
    first = model_fingerprint(tiny_model)
    with torch.no_grad():
        tiny_model.model.norm.weight[0] += 1e-3
    second = model_fingerprint(tiny_model)

    assert len({first, second, model_fingerprint(tiny_model.bfloat16())}) == 3


def test_the_table_shows_every_figure_beside_its_reference(report):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_table(report))
    text = console.export_text()

    for name, sides in report["figures"].items():
        assert name in text
        assert f"{sides['erased']['value']:.3f}" in text


def test_samples_are_written_with_the_true_answer(report, tmp_path):
    write_samples(tmp_path / "samples.md", report)

    text = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert "What is the capital of Togo?** (true answer: Lomé)" in text
    assert text.count("- reference: ") == text.count("- erased: ") == 2


@pytest.mark.parametrize("log", [LOG, []])
def test_the_plot_is_a_picture_with_and_without_a_training_log(report, tmp_path, log):
    plot_report(report | {"training_log": log}, tmp_path / "report.png")

    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_answers_that_are_all_empty_are_still_measured(tiny_peft_model, tokenizer, suite, monkeypatch):
    monkeypatch.setattr("elm_trainer.evaluation.report.generate", lambda *args, **options: [""] * len(args[2]))

    figures = measure(tiny_peft_model, tokenizer, suite)["figures"]

    assert figures["fluency.empty"]["erased"]["value"] == 1
