import io
import json
import sys
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

from elm_trainer.attacks import (
    Attack,
    AttackResult,
    LayerRemovalAttack,
    RelearningAttack,
    ScalingAttack,
    attack_erasure,
    built_in_target,
)
from elm_trainer.attacks.report import markdown_attacks, plot_attacks, render_attacks
from elm_trainer.evaluation.pair import ModelPair
from elm_trainer.evaluation.statistics import bootstrap_mean
from tests.processes import run


RUNS: list[str] = []


@dataclass
class Recorded(Attack):
    """Notes that it ran, and answers all but the first questions rightly; or dies."""

    name = "recorded"
    label: str = ""
    wrong: int = 0
    dies: bool = False

    def run(self, target):
        if self.dies:
            raise KeyboardInterrupt
        RUNS.append(self.label)
        asked = list(range(2, len(target.questions)))
        rights = [index >= self.wrong for index in range(len(asked))]
        curve = [(1, [False] * len(asked)), (2, rights)]
        return [AttackResult(f"{self.name}.{self.label}", "pmi", rights, None, asked, curve, {"texts": 7})]


@pytest.fixture(autouse=True)
def no_runs_yet():
    RUNS.clear()


@pytest.fixture
def untouched(tiny_peft_model, tokenizer):
    """A fresh adapter, which does nothing."""
    return built_in_target(ModelPair(tiny_peft_model), tokenizer, "capitals", questions=20)


def test_the_report_names_the_attack_that_brings_knowledge_back(untouched, tmp_path):
    attacks = [ScalingAttack(), Recorded(label="weak", wrong=9), Recorded(label="strong")]
    report = attack_erasure(untouched, attacks, output_dir=tmp_path)
    assert report == json.loads((tmp_path / "attacks.json").read_text())
    assert report["kind"] == "attacks"
    figure = report["figures"]["recorded.strong.pmi"]
    assert figure["erased"]["value"] == 1 and figure["brings_back"] and figure["p"] < 0.05
    # The adapter of a fresh model does nothing, so its scale changes nothing.
    scaled = report["figures"]["scaling.0.5.pmi"]
    assert scaled["p"] == 1 and not scaled["brings_back"] and scaled["erased"] == scaled["unattacked"]
    assert report["figures"]["none.pmi"]["reference"] == report["figures"]["none.pmi"]["erased"]


def test_an_attack_on_a_part_of_the_questions_is_compared_with_that_part(untouched):
    unattacked = bootstrap_mean(untouched.rank()[2:]).to_dict()
    report = attack_erasure(untouched, [Recorded(label="a")])
    assert report["figures"]["recorded.a.pmi"]["unattacked"] == unattacked
    assert report["figures"]["recorded.a.pmi"]["erased"]["n"] == 18
    assert report["worst_case"]["pmi"] == {
        "name": "recorded.a.pmi",
        "erased": bootstrap_mean([True] * 18).to_dict(),
        "plain": unattacked,
    }
    start, first, last = report["curves"]["recorded.a.pmi"]
    assert start == [0, unattacked["value"], unattacked["low"], unattacked["high"]]
    assert first == [1, 0.0, 0.0, 0.0] and last == [2, 1.0, 1.0, 1.0]
    assert report["attacks"][-1]["details"] == {"recorded.a.pmi": {"texts": 7}}


def test_each_attack_has_a_worst_case_of_its_own(untouched):
    report = attack_erasure(untouched, [Recorded(label="weak", wrong=9), Recorded(label="strong"), ScalingAttack()])
    assert report["families"]["recorded"]["pmi"]["name"] == "recorded.strong.pmi"
    assert report["families"].keys() == {"recorded", "scaling"}
    assert report["worst_case"].keys() == {"pmi", "names_answer"}


def test_what_has_no_meaning_is_listed_with_the_reason(checkpoint_target):
    report = attack_erasure(checkpoint_target, [RelearningAttack(weights="adapter"), LayerRemovalAttack()])
    [entry] = report["skipped"]
    assert entry["name"] == "relearning" and entry["settings"]["weights"] == "adapter"
    assert entry["reason"] == "the erased model has no adapter to tune"
    assert "layer-removal.1.pmi" in report["figures"]
    assert "## Skipped" in markdown_attacks(report) and "no adapter to tune" in markdown_attacks(report)


def test_an_adapter_and_the_checkpoint_it_makes_fare_alike(target, checkpoint_target):
    attacks = [ScalingAttack(), LayerRemovalAttack()]
    adapter, checkpoint = (attack_erasure(each, attacks) for each in (target, checkpoint_target))
    assert adapter["figures"] == checkpoint["figures"]
    assert adapter["reference_sha256"] == checkpoint["reference_sha256"]
    assert adapter["erased_sha256"] != checkpoint["erased_sha256"]


def test_tables_and_pictures_are_made_of_the_report_alone(untouched, tmp_path):
    report = attack_erasure(untouched, [ScalingAttack(), Recorded(label="a")])
    report = json.loads(json.dumps(report))
    plot_attacks(report, tmp_path / "attacks.png")
    assert (tmp_path / "attacks.png").read_bytes().startswith(b"\x89PNG")
    plot_attacks(report | {"curves": {}}, tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size < (tmp_path / "attacks.png").stat().st_size
    console = Console(width=80, file=io.StringIO())
    console.print(render_attacks(report))
    printed = console.file.getvalue()
    assert "ranked rightly, by PMI" in printed and "  recorded, a " in printed
    assert "[1.00, 1.00]" in printed and max(map(len, printed.splitlines())) <= 80
    text = markdown_attacks(report)
    assert "Worst case by `pmi`: **1.00 [1.00, 1.00]** under `recorded.a.pmi`" in text
    assert text.count("| recorded.a | pmi | 18 | – |") == 2  # among the strongest, and among all


def test_an_interrupted_run_goes_on_with_the_next_attack(untouched, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        attack_erasure(untouched, [Recorded(label="a"), Recorded(dies=True)], output_dir=tmp_path)
    assert not (tmp_path / "attacks.json").exists()
    with (tmp_path / "attacks.partial.jsonl").open("a") as file:
        file.write('{"name": "half a li')
    report = attack_erasure(untouched, [Recorded(label="a"), Recorded(label="b")], output_dir=tmp_path)
    assert RUNS == ["a", "b"]
    assert {"recorded.a.pmi", "recorded.b.pmi"} < report["figures"].keys()
    assert not (tmp_path / "attacks.partial.jsonl").exists()


@pytest.mark.parametrize("changed", ["adapter", "texts"])
def test_what_a_figure_depends_on_is_attacked_anew(changed, untouched, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        attack_erasure(untouched, [Recorded(label="a"), Recorded(dies=True)], output_dir=tmp_path)
    if changed == "adapter":
        with torch.no_grad():
            next(p for n, p in untouched.pair.erased.named_parameters() if "lora_B" in n).fill_(0.1)
    else:
        untouched.texts["forget"].append("One more.")
    attack_erasure(untouched, [Recorded(label="a")], output_dir=tmp_path)
    assert RUNS == ["a", "a"]


def test_no_attacks_at_all_are_refused(untouched):
    with pytest.raises(ValueError, match="`attacks` is empty"):
        attack_erasure(untouched, [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --adapter, or --model with its --reference"),
        (["--adapter=a", "--reference=b"], "either --adapter"),
        (["--adapter=a", "--attacks", "gcg", "--ladder=x.yaml"], "either --attacks or --ladder"),
    ],
)
def test_the_example_wants_one_thing_to_attack(arguments, message):
    ended = run([sys.executable, "examples/attack.py", *arguments])
    assert ended.returncode == 2 and message in ended.stderr


@pytest.mark.slow
def test_the_example_attacks_a_saved_adapter_and_a_checkpoint(tmp_path):
    from peft import LoraConfig, get_peft_model

    from elm_trainer import load_model_and_tokenizer

    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    model.save_pretrained(tmp_path / "checkpoint")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    for kind, what in (
        ("adapter", [f"--adapter={tmp_path / 'adapter'}"]),
        ("checkpoint", [f"--model={tmp_path / 'checkpoint'}", "--reference=smollm2-135m-instruct"]),
    ):
        output = tmp_path / kind
        command = [sys.executable, "examples/attack.py", *what, f"--output_dir={output}", "--questions=8"]
        run([*command, "--attacks", "scaling", "few-shot"], check=True)
        report = json.loads((output / "attacks.json").read_text())
        assert {"scaling.0.5.pmi", "scaling.1.5.pmi", "few-shot.5.names_answer"} < report["figures"].keys()
        assert report["figures"]["none.pmi"]["erased"]["value"] >= 0.5  # nothing was erased
        assert (output / "attacks.png").exists() and "# Attacks" in (output / "attacks.md").read_text()
