import json
import os
import subprocess
import sys

import datasets
import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from elm_trainer import EvaluationSuite, evaluate_erasure
from elm_trainer.data.facts import BANKS, load_bank
from elm_trainer.data.questions import split_of
from elm_trainer.evaluation.benchmarks import TASKS, HarnessTasks, harness_tasks
from elm_trainer.evaluation.evaluate import write_evaluation
from elm_trainer.evaluation.likelihood import score_choices
from elm_trainer.evaluation.report import compare_reports


pytest.importorskip("lm_eval")


def sorted_samples(result, task):
    return sorted(result["samples"][task], key=lambda sample: sample["doc_id"])


def export_banks(folder):
    """Write the question banks as the JSON lines that the task files read: into `harness_tasks()` where a bank has changed."""
    for bank in BANKS:
        rows = [
            {
                "question": question.text,
                "options": question.options,
                "label": question.options.index(question.answer),
                "subject": question.subject,
                "topic": question.topic,
                "split": split_of(question),
            }
            for question in load_bank(bank)
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{bank}.jsonl").write_text("\n".join(lines) + "\n")


def test_the_shipped_tasks_hold_the_banks_as_they_are(tmp_path):
    export_banks(tmp_path)
    for bank in BANKS:
        assert (harness_tasks() / f"{bank}.jsonl").read_text() == (tmp_path / f"{bank}.jsonl").read_text()


@pytest.mark.parametrize("bank", BANKS)
def test_the_harness_and_our_scorer_agree_on_the_test_split(bank, sharp_model, tokenizer):
    questions = load_bank(bank, split="test")[:20]
    ours = score_choices(sharp_model, tokenizer, questions, batch_size=7)
    theirs = HarnessTasks([f"elm_{bank}"], limit=20).run(sharp_model, tokenizer, batch_size=4)

    samples = sorted_samples(theirs, f"elm_{bank}")
    assert [sample["doc"]["question"] for sample in samples] == [question.text for question in questions]
    assert [bool(sample["acc"]) for sample in samples] == ours.log_likelihood
    assert [bool(sample["acc_norm"]) for sample in samples] == ours.normalized
    assert theirs["results"][f"elm_{bank}"]["acc,none"] == sum(ours.log_likelihood) / 20
    assert theirs["results"][f"elm_{bank}"]["acc_norm,none"] == sum(ours.normalized) / 20
    for sample, scores in zip(samples, ours.scores, strict=True):
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(scores, abs=1e-4)


def test_the_dev_split_is_never_asked(tiny_model, tokenizer):
    result = HarnessTasks(["elm_general"]).run(tiny_model, tokenizer, batch_size=64)

    asked = [sample["doc"]["question"] for sample in sorted_samples(result, "elm_general")]
    assert asked == [question.text for question in load_bank("general", split="test")]


def test_the_model_is_handed_back_in_the_mode_it_came_in(tiny_model, tokenizer):
    tiny_model.train()
    HarnessTasks(["elm_general"], limit=1).run(tiny_model, tokenizer)

    assert tiny_model.training


def test_a_report_has_what_the_harness_says_and_is_compared_with_no_other_revision(adapted_model, tokenizer, tmp_path):
    tasks = ["elm_general", "elm_geography"]
    suite = EvaluationSuite({}, {}, {}, {}, [], [], harness=tasks, limit=9)
    report = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=["harness"])
    theirs = HarnessTasks(tasks, limit=9).run(adapted_model, tokenizer)

    for task in tasks:
        found = report["harness"][task]
        assert (found["size"], found["version"], found["num_fewshot"], found["revision"]) == (9, 1.0, 0, None)
        acc = found["metrics"]["acc"]["erased"]
        assert acc["n"] == 9 and acc["value"] == pytest.approx(theirs["results"][task]["acc,none"])
        assert acc["stderr"] == pytest.approx(theirs["results"][task]["acc_stderr,none"])
        assert report["figures"][f"harness.{task}.acc"]["erased"]["value"] == acc["value"]
    assert report["figures"]["harness.elm_general.acc"]["p"] is not None
    assert compare_reports(report, report)["harness.elm_general.acc"]["change"]["value"] == 0.0
    for other in ({"revision": "b" * 40}, {"version": 2.0}, {"num_fewshot": 5}, {"size": 8}):
        changed = report["datasets"] | {"harness elm_general": report["datasets"]["harness elm_general"] | other}
        [(key, value)] = other.items()
        with pytest.raises(ValueError, match=f"'harness elm_general' is .*'{key}': '?{value}.*same version, revision"):
            compare_reports(report, {**report, "datasets": changed})
    write_evaluation(tmp_path, report)
    told = (tmp_path / "report.md").read_text()
    assert "| elm_general | lm-evaluation-harness, acc | 9 |" in told
    assert "| harness elm_general | task version 1.0, 0 examples | 9 |" in told


def test_a_reference_that_answered_another_revision_is_asked_again(adapted_model, tokenizer, tmp_path, monkeypatch):
    suite = EvaluationSuite({}, {}, {}, {}, [], [], harness=["elm_general"], limit=2)
    asked = []
    run = HarnessTasks.run
    monkeypatch.setattr(HarnessTasks, "run", lambda self, *args, **kw: asked.append(1) or run(self, *args, **kw))

    def evaluate():
        asked.clear()
        evaluate_erasure(adapted_model, None, suite, tokenizer, measures=["harness"], reference_dir=tmp_path)
        return len(asked)

    assert (evaluate(), evaluate()) == (2, 1)
    monkeypatch.setattr("elm_trainer.evaluation.benchmarks.dataset_revision", lambda data: "b" * 40)
    assert evaluate() == 2


@pytest.mark.slow  # the harness reads its thousands of task files first
def test_the_harness_own_wmdp_and_mmlu_stand_in_a_report(adapted_model, tokenizer, tmp_path, monkeypatch):
    rows = {
        "question": [f"Which number is {n}?" for n in range(3)],
        "choices": [["0", "1", "2", "3"]] * 3,
        "answer": [0, 1, 2],
    }
    commit = "c" * 40
    Dataset.from_dict(rows).save_to_disk(tmp_path / commit)
    data = Dataset.load_from_disk(tmp_path / commit)
    loaded = []

    def load(path, name=None, **kwargs):
        loaded.append(path)
        return DatasetDict(test=data, validation=data, dev=data)

    monkeypatch.setattr(datasets, "load_dataset", load)
    theirs = []
    run = HarnessTasks.run
    monkeypatch.setattr(HarnessTasks, "run", lambda *args, **kw: theirs.append(run(*args, **kw)) or theirs[-1])
    suite = EvaluationSuite({}, {}, {}, {}, [], [], harness=["wmdp_bio", "mmlu"], num_fewshot=1, limit=1)
    report = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=["harness"])

    assert set(loaded) == {"cais/wmdp", "cais/mmlu"}
    # WMDP's task asks without examples whatever is given, as with the harness's own command.
    for name, size, shots in (("wmdp_bio", 1, 0), ("mmlu", 57, 1)):
        asked = report["datasets"][f"harness {name}"]
        assert (asked["size"], asked["revision"], asked["num_fewshot"]) == (size, commit, shots)
        for side, found in zip(("reference", "erased"), theirs, strict=True):
            ours = report["harness"][name]["metrics"]["acc"][side]["value"]
            assert ours == pytest.approx(found["results"][name]["acc,none"])


@pytest.mark.slow  # the harness reads its thousands of task files first
def test_an_unknown_task_is_refused(tiny_model, tokenizer):
    with pytest.raises(ValueError, match="'no_such_task'.*elm_capitals"):
        HarnessTasks(["no_such_task"]).run(tiny_model, tokenizer)


@pytest.mark.slow
def test_a_task_file_of_ones_own_is_found(tiny_model, tokenizer, tmp_path):
    (tmp_path / "rivers.jsonl").write_text(
        json.dumps({"question": "Which river flows through Cairo?", "options": ["Nile", "Rhine"], "label": 0}) + "\n"
    )
    (tmp_path / "rivers.yaml").write_text(
        f"include: {harness_tasks() / '_elm_common'}\n"
        "task: my_rivers\n"
        "custom_dataset: null\n"
        "fewshot_split: null\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rivers.jsonl'}}}}}\n"
    )

    result = HarnessTasks(["my_rivers"], include_path=tmp_path).run(tiny_model, tokenizer)

    assert len(result["samples"]["my_rivers"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["wmdp_bio", "mmlu_anatomy", "tinyMMLU"])
def test_the_harness_own_tasks_are_known_and_want_their_data_from_the_hub(task, tiny_model, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)

    with pytest.raises((OSError, ImportError)) as caught:  # ConnectionError, or tinyBenchmarks is not installed
        HarnessTasks([task], limit=1).run(tiny_model, tokenizer)

    assert "`tasks` names" not in str(caught.value)


@pytest.mark.slow
def test_the_command_line_of_the_harness_works_without_our_package(sharp_model, tokenizer, tmp_path):
    sharp_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    adapted = get_peft_model(sharp_model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    # A finder that refuses our package stands before all others in the process of the command.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'elm_trainer':\n"
        "            raise ImportError('elm_trainer was imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )

    done = subprocess.run(
        [
            sys.executable, "-m", "lm_eval", "--model", "hf",
            "--model_args", f"pretrained={tmp_path / 'model'},peft={tmp_path / 'adapter'},dtype=float32",
            "--tasks", "elm_capitals", "--include_path", str(harness_tasks()), "--limit", "20", "--device", "cpu",
            "--output_path", str(tmp_path / "out"), "--log_samples",
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-2000:]
    [lines] = (tmp_path / "out").rglob("samples_elm_capitals_*.jsonl")
    samples = sorted(map(json.loads, lines.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    ours = score_choices(adapted, tokenizer, load_bank("capitals", split="test")[:20])
    assert [bool(sample["acc"]) for sample in samples] == ours.log_likelihood
    assert [bool(sample["acc_norm"]) for sample in samples] == ours.normalized
    for sample, scores in zip(samples, ours.scores, strict=True):
        assert [float(answer[0][0]) for answer in sample["resps"]] == pytest.approx(scores, abs=1e-4)


def test_there_is_a_task_for_every_bank():
    assert {path.stem for path in harness_tasks().glob("*.yaml")} == set(TASKS)


@pytest.fixture
def sharp_model(tiny_model) -> LlamaForCausalLM:
    """A random model whose choices are far from ties."""
    for parameter in tiny_model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(5)
    return tiny_model
