import copy
import json
import os
import random
import signal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from elm_trainer import EvaluationSuite, evaluate_erasure, load_bank, read_report
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.fluency import as_prompt
from elm_trainer.evaluation.likelihood import letter_prompt
from elm_trainer.evaluation.pair import ModelPair
from elm_trainer.evaluation.suite import OpenQuestion
from elm_trainer.files import append_line
from elm_trainer.run_lock import FolderInUseError
from tests.test_run_lock import start


CONTENT = ("multiple-choice", "letter-choice", "open-answers", "cloze", "greedy-fluency", "specificity")


def test_every_figure_has_an_interval_on_both_sides_and_a_change(report):
    rules = ("pmi", "log_likelihood", "normalized", "letter")
    expected = {f"multiple_choice.{bank}.{rule}" for bank in ("capitals", "geography") for rule in rules}
    expected |= {
        "open_answers.capitals",
        "open_answers.geography",
        "cloze.capitals",
        "retention.perplexity",
        "retention.kl",
    }
    assert expected < set(report["figures"])
    expected |= {
        f"{kind}.capitals.{key}" for kind in ("open_answers", "cloze") for key in ("commonest", "entropy", "evenness")
    }
    assert {name.split(".")[1] for name in set(report["figures"]) - expected} <= {"greedy", "erased"}
    for name, figure in report["figures"].items():
        for side in ("reference", "erased", "change"):
            assert figure[side]["n"] > 0 and figure[side]["low"] <= figure[side]["high"], name
        assert figure["p"] is None or 0 < figure["p"] <= 1


def test_an_untouched_adapter_measures_as_its_reference(tiny_peft_model, tokenizer, suite):
    report = evaluate_erasure(tiny_peft_model, None, suite, tokenizer, measures=CONTENT)
    for name, figure in report["figures"].items():
        assert figure["erased"] == pytest.approx(figure["reference"]), name
    assert report["figures"]["retention.kl"]["erased"]["value"] == 0
    assert all(sample["reference"] == sample["erased"] for sample in report["samples"])


def test_a_merged_model_measures_as_its_adapter(adapted_model, tiny_model, tokenizer, suite):
    measures = ["multiple-choice", "open-answers", "specificity"]
    as_adapter = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures)
    reference = copy.deepcopy(adapted_model).unload()
    merged = copy.deepcopy(adapted_model).merge_and_unload()
    as_full = evaluate_erasure(merged, reference, suite, tokenizer, measures=measures)
    assert as_full["reference_sha256"] == as_adapter["reference_sha256"]
    for name, figure in as_adapter["figures"].items():
        for side in ("reference", "erased"):
            assert as_full["figures"][name][side] == pytest.approx(figure[side], rel=1e-4), name


def test_another_judge_reads_with_its_own_tokenizer(adapted_model, tiny_model, tokenizer, suite):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    measures = ["greedy-fluency", "sampled-fluency"]
    report = evaluate_erasure(
        adapted_model, None, suite, tokenizer, measures=measures, judges={"other": (tiny_model, plain)}
    )
    for how in ("greedy", "sampled"):
        ours, theirs = (report["figures"][f"fluency.{how}.r_ppl{judge}"]["reference"] for judge in ("", ".other"))
        assert theirs["value"] != ours["value"] and theirs["n"] == ours["n"]


def test_an_interrupted_evaluation_goes_on_with_the_next_measurement(
    adapted_model, tokenizer, suite, tmp_path, monkeypatch
):
    measures = ["multiple-choice", "cloze", "specificity"]
    whole = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures, output_dir=tmp_path / "whole")
    forward = type(adapted_model.get_base_model()).forward
    calls = []

    def counted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(adapted_model.get_base_model()), "forward", counted)
    limit = 0
    evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures)
    needed, limit = len(calls), len(calls) - 2
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures, output_dir=tmp_path / "cut")
    assert not (tmp_path / "cut" / "report.json").exists()
    calls.clear()
    limit = 0
    resumed = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures, output_dir=tmp_path / "cut")
    assert len(calls) < needed / 2
    assert resumed["figures"] == whole["figures"] == read_report(tmp_path / "cut" / "report.json")["figures"]
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["report.json"]


def test_what_the_reference_answers_is_measured_once_for_many_erasures(
    adapted_model, tokenizer, suite, tmp_path, monkeypatch
):
    measures = ["multiple-choice", "cloze"]
    plain = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures)
    options = {"measures": measures, "reference_dir": tmp_path}
    first = evaluate_erasure(adapted_model, None, suite, tokenizer, **options)
    with torch.no_grad():
        next(p for name, p in adapted_model.named_parameters() if "lora_B" in name).add_(0.5)
    sides = []
    monkeypatch.setattr(ModelPair, "use", lambda self, side, use=ModelPair.use: sides.append(side) or use(self, side))
    second = evaluate_erasure(adapted_model, None, suite, tokenizer, **options)
    # Twice to tell who the reference is, and never to ask it.
    assert sides.count("reference") == 2 and sides.count("erased") == len(measures)
    for name, figure in plain["figures"].items():
        assert first["figures"][name] == figure
        assert second["figures"][name]["reference"] == figure["reference"]
    suite.cloze["capitals"] *= 2
    assert (
        evaluate_erasure(adapted_model, None, suite, tokenizer, **options)["figures"]["cloze.capitals"]["reference"][
            "n"
        ]
        == 2
    )


def test_the_report_holds_what_was_asked_and_the_details(adapted_model, tokenizer, suite, tmp_path):
    suite.revision = "abc"
    details = {"recipe": {"eta": 1.5}, "datasets": {"forget": {"size": 1}}, "seconds": {"train": 2.0}}
    report = evaluate_erasure(
        adapted_model, None, suite, tokenizer, measures=["cloze"], output_dir=tmp_path, details=details
    )
    assert report["datasets"]["bank capitals"].keys() == {"revision", "size", "sha256"}
    assert report["datasets"]["bank capitals"]["revision"] == "abc" and report["datasets"]["forget"] == {"size": 1}
    assert report["recipe"] == {"eta": 1.5} and {"train", "cloze erased"} < report["seconds"].keys()
    assert json.loads((tmp_path / "report.json").read_text())["kind"] == "evaluation"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": ["magic"]}, r"`measures` names \['magic'\].*multiple-choice.*inside"),
        ({"banks": {"capitals": []}}, "'capitals' holds no questions after filtering"),
        ({"banks": {"capitals": [Question("Where?", ("a", "a"), "a")]}}, "`options` holds duplicates"),
        ({"reference": True}, "`reference` has a vocabulary of 17 tokens"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(change, message, adapted_model, tokenizer, suite):
    reference = None
    if change.get("reference"):
        sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        reference = LlamaForCausalLM(LlamaConfig(vocab_size=17, **sizes))
    suite.banks = change.get("banks", suite.banks)
    with pytest.raises(ValueError, match=message):
        evaluate_erasure(adapted_model, reference, suite, tokenizer, measures=change.get("measures"))


@pytest.fixture(scope="module")
def knowing(tokenizer):
    """A tiny model that knows sixteen capitals by every way of asking, and a suite that asks it."""
    questions = load_bank("capitals")[::17][:16]
    suite = EvaluationSuite(
        banks={"capitals": questions},
        roles={"capitals": "erased"},
        open_questions={"capitals": [OpenQuestion(q.text, q.answer) for q in questions]},
        cloze={"capitals": [OpenQuestion(f"Quiz. {q.subject} ->", q.answer) for q in questions]},
        concept_prompts=[f"Speak of {q.subject}." for q in questions],
        retain_texts=["The cat sat on the mat.", "Bread needs flour and some water."],
        max_new_tokens=12,
        answer_tokens=6,
    )
    told = [(f"{letter_prompt(q)}", f" {'ABCD'[q.options.index(q.answer)]}") for q in questions]
    told += [(f"Question: {q.text}\nAnswer:", f" {q.answer}") for q in questions]
    told += [(as_prompt(tokenizer, q.text), f"{q.answer}") for q in questions]
    told += [(f"Quiz. {q.subject} ->", f" {q.answer}") for q in questions]
    told += [(as_prompt(tokenizer, p), "It is a fine place with many old streets.") for p in suite.concept_prompts]
    told += [("", text) for text in suite.retain_texts for _ in range(4)]
    # A small vocabulary of its own, so that training takes seconds.
    tokenizer = tokenizer.train_new_from_iterator([prompt + completion for prompt, completion in told], 1000)
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes))
    end = tokenizer.eos_token
    rows = [tokenizer(prompt + completion + end)["input_ids"] for prompt, completion in told]
    starts = [len(tokenizer(prompt)["input_ids"]) for prompt, _ in told]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    rng = random.Random(0)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 250)
        batch = rng.sample(range(len(rows)), 32)
        width = max(len(rows[index]) for index in batch)
        ids = torch.tensor([rows[index] + [tokenizer.pad_token_id] * (width - len(rows[index])) for index in batch])
        labels = torch.tensor(
            [[t if starts[i] <= k < len(rows[i]) else -100 for k, t in enumerate(row)] for i, row in zip(batch, ids.tolist(), strict=True)]
        )  # fmt: skip
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer, suite


def adapter_on_the_head(model):
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["lm_head"])
    return get_peft_model(copy.deepcopy(model), config)


@pytest.mark.slow
def test_a_model_that_is_not_erased_fails_innocence(knowing):
    model, tokenizer, suite = knowing
    report = evaluate_erasure(adapter_on_the_head(model), None, suite, tokenizer, measures=CONTENT)
    assert report["figures"]["multiple_choice.capitals.pmi"]["reference"]["value"] > 0.9
    assert report["figures"]["open_answers.capitals"]["erased"]["value"] > 0.9
    assert report["verdict"]["innocence"]["state"] == "fails"
    worst = report["verdict"]["innocence"]["worst"]
    assert worst["bank"] == "capitals" and worst["share"] == pytest.approx(1)
    for rule in ("pmi", "log_likelihood"):
        assert report["figures"][f"families.erased.{rule}"]["left"]["value"] == pytest.approx(1)
    assert [flag["flag"] for flag in report["flags"] if flag["flag"] != "shortcut"] == ["not-erased"]
    assert report["verdict"]["seamlessness"]["state"] == report["verdict"]["specificity"]["state"] == "holds"


@pytest.mark.slow
def test_gibberish_fails_seamlessness(knowing):
    model, tokenizer, suite = knowing
    erased = adapter_on_the_head(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in erased.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=3.0)
    report = evaluate_erasure(erased, None, suite, tokenizer, measures=CONTENT)
    assert report["verdict"]["seamlessness"]["state"] == "fails"
    failed = {check["figure"] for check in report["verdict"]["seamlessness"]["checks"] if check["state"] == "fails"}
    assert "fluency.greedy.r_ppl" in failed
    assert report["verdict"]["specificity"]["state"] == "fails"


@pytest.mark.slow
def test_an_adapter_that_only_shuffles_the_letters_is_flagged(knowing):
    model, tokenizer, suite = knowing
    erased = adapter_on_the_head(model)
    letters = [tokenizer(f" {letter}")["input_ids"][-1] for letter in "ABCD"]
    rows = model.lm_head.weight[letters].detach()
    with torch.no_grad():
        # The update of rank four that gives each letter its neighbour's row of the head.
        head = erased.base_model.model.lm_head
        head.lora_A["default"].weight.copy_(rows.roll(1, 0) - rows)
        head.lora_B["default"].weight.zero_()
        head.lora_B["default"].weight[letters] = torch.eye(4)
    report = evaluate_erasure(erased, None, suite, tokenizer, measures=CONTENT)
    figures = report["figures"]
    assert figures["multiple_choice.capitals.letter"]["reference"]["value"] > 0.9
    assert figures["multiple_choice.capitals.letter"]["erased"]["value"] < 0.3
    assert figures["multiple_choice.capitals.pmi"]["erased"]["value"] > 0.9
    assert "letter-choice-only" in {flag["flag"] for flag in report["flags"]}
    assert report["verdict"]["innocence"]["state"] == "fails"


def test_an_evaluation_that_is_killed_goes_on_to_the_same_figures(
    adapted_model, tokenizer, suite, tmp_path, monkeypatch
):
    measures = ["multiple-choice", "cloze", "specificity"]
    whole = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures, output_dir=tmp_path / "whole")
    child = os.fork()
    if child == 0:
        rows = []

        def kill_at_the_third(path, line):
            rows.append(line)
            if len(rows) == 3:
                with path.open("a") as file:
                    file.write(line[: len(line) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            append_line(path, line)

        monkeypatch.setattr("elm_trainer.files.append_line", kill_at_the_third)
        try:
            evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures, output_dir=tmp_path / "killed")
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len((tmp_path / "killed" / "report.partial.jsonl").read_text().splitlines()) == 3

    again = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=measures, output_dir=tmp_path / "killed")
    assert again["figures"] == whole["figures"]
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["report.json"]


def test_a_second_evaluation_in_the_folder_is_refused(adapted_model, tokenizer, suite, tmp_path):
    process, pid = start(tmp_path)
    try:
        with pytest.raises(FolderInUseError, match=f"another run is writing .process {pid} on"):
            evaluate_erasure(adapted_model, None, suite, tokenizer, measures=["cloze"], output_dir=tmp_path)
    finally:
        process.kill()
        process.join()


def test_a_report_that_cannot_be_written_is_named_and_nothing_measured_is_lost(
    adapted_model, tokenizer, suite, tmp_path, monkeypatch
):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError, match="report.json could not be written"):
        evaluate_erasure(adapted_model, None, suite, tokenizer, measures=["cloze"], output_dir=tmp_path)
    (tmp_path / "report.json").rmdir()
    monkeypatch.setattr("elm_trainer.evaluation.evaluate._measure", pytest.fail)
    evaluate_erasure(adapted_model, None, suite, tokenizer, measures=["cloze"], output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
