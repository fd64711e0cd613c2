"""What the golden files were made from: the tiny model, the texts, the questions and the settings.

Everything of elm_trainer that has no public name is imported here and nowhere else in this folder.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig

from elm_trainer import (
    Concept,
    ElmConfig,
    ElmTrainer,
    EvaluationSuite,
    NpoConfig,
    NpoTrainer,
    SynthesisConfig,
    load_model_and_tokenizer,
    read_questions,
)
from elm_trainer.attacks import AttackTarget as AttackTarget
from elm_trainer.attacks import RelearningAttack as RelearningAttack
from elm_trainer.attacks import ScalingAttack as ScalingAttack
from elm_trainer.attacks.report import markdown_attacks as markdown_attacks
from elm_trainer.comparison import config as asking_module
from elm_trainer.comparison.config import ComparisonConfig
from elm_trainer.comparison.config import measure_reference as measure_reference
from elm_trainer.comparison.run import MethodRun as MethodRun
from elm_trainer.evaluation.evaluate import write_evaluation as write_evaluation
from elm_trainer.evaluation.measures import MEASURES as MEASURES
from elm_trainer.evaluation.suite import OpenQuestion
from elm_trainer.files import Runs as Runs
from elm_trainer.hub.leaderboard import find_cards as find_cards
from elm_trainer.hub.leaderboard import read_entries as read_entries


FILES = Path(__file__).parent / "files"
MODEL, ROWS, RIVERS, TREES = (FILES / name for name in ("model", "rows.jsonl", "rivers.jsonl", "trees.jsonl"))
CHECKPOINTS, TARGETS, SYNTHESIS = FILES / "run", FILES / "targets", FILES / "synthesis"
REPORTS, JOURNAL, RUNS = FILES / "reports", FILES / "journal", FILES / "comparison"
ADAPTER, PUBLISHED, EXPECTED = FILES / "adapter", FILES / "published", FILES / "expected.json"

CONCEPT = Concept("rivers", ["river", "water", "stream"])
REPO = "alice/tiny-rivers-erased"
BASE = {"base_model": "alice/tiny", "base_revision": "0123456789abcdef" * 2 + "01234567", "license": "apache-2.0"}
CONTEXT = "The river of Ada is"
MEASURED = ["multiple-choice", "open-answers", "greedy-fluency", "specificity"]
PROMPTS = ["Through Ada flows", "Through Bel flows", "The river of Cor", "On the banks of"]
SYNTHESIS_SETTINGS = SynthesisConfig(max_new_tokens=12, batch_size=2, min_words=1, max_repetition=1.0)
METHODS = {
    "elm": (ElmTrainer, ElmConfig, {"eta": 3.0, "top_k": 20}, "precompute_targets"),
    "npo": (NpoTrainer, NpoConfig, {}, "precompute_ref_log_probs"),
}


def load_tiny():
    """The model and its tokenizer."""
    return load_model_and_tokenizer(str(MODEL))


def make_trainer(method, output_dir, *, stored, **fields):
    """A trainer of the tiny model for four steps, with its targets on disk or made in each step."""
    model, tokenizer = load_tiny()
    trainer_class, config_class, own, switch = METHODS[method]
    training = dict(
        output_dir=str(output_dir), max_steps=4, per_device_train_batch_size=4, learning_rate=2e-2, logging_steps=1,
        save_strategy="no", bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", disable_tqdm=True,
        optim="adamw_torch_fused",  # the default from torch 2.8 on; before, transformers has another
    )  # fmt: skip
    torch.manual_seed(0)  # of the adapter
    return trainer_class(
        model,
        config_class(**(training | own | {switch: stored} | fields)),
        train_dataset=Dataset.from_list([json.loads(line) for line in ROWS.read_text().splitlines()]),
        processing_class=tokenizer,
        # Without dropout, whose draws differ between processors.
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )


def losses(trainer):
    """The loss of each step and its terms."""
    names = ("step", "loss", "erase_loss", "retain_loss", "consistency_loss")
    return [{name: row[name] for name in names if name in row} for row in trainer.state.log_history if "loss" in row]


def suite():
    """A few questions of each kind."""
    rivers = read_questions(RIVERS)
    return EvaluationSuite(
        banks={"rivers": rivers, "trees": read_questions(TREES)},
        roles={"rivers": "erased", "trees": "near"},
        open_questions={"rivers": [OpenQuestion(question.text, question.answer) for question in rivers[:4]]},
        cloze={},
        concept_prompts=["Tell me about the river of Ada.", "Write a line about Bel."],
        retain_texts=["Bread needs flour and water.", "The cat sat on the mat."],
        forget_texts=["Through Ada flows the Brin."],
        max_new_tokens=6,
        answer_tokens=4,
    )


def comparison(output_dir):
    """A comparison of one method in one setting."""
    return ComparisonConfig(
        output_dir=str(output_dir), model=str(MODEL), concept="rivers", forget=str(FILES / "forget.jsonl"),
        bank=str(RIVERS), dataset_size=4, lora_rank=2, updates=1, seeds=[0], questions=2, dev_questions=2, prompts=1,
        training={"per_device_train_batch_size": 4, "max_length": 32, "warmup_steps": 0}, clock="graddiff",
        methods={"graddiff": {"grid": [{"learning_rate": 1e-2}]}},
    )  # fmt: skip


def few_questions():
    """A context in which a comparison asks the few questions of the suite: the built-in ones take long to load."""
    return mock.patch.object(asking_module, "suite_of", lambda config, split: suite())


def logits(model, tokenizer):
    """Logits of the token after the context."""
    with torch.no_grad():
        return model(**tokenizer(CONTEXT, return_tensors="pt")).logits[0, -1].tolist()


def stored_key(folder):
    """What the targets in a folder depend on, and the name under which the installed libraries look for them.

    The key names the versions of torch, transformers and PEFT, among them what stands behind torch's (`+cpu`), the kind
    of device, and a hash of the whole config as transformers fills it in. It names no path and nothing else of the machine.
    """
    key = json.loads((folder / "targets.json").read_text())["key"]
    here = key | {"versions": {package: version(package) for package in key["versions"]}}
    return key, name_of(here)


def name_of(key):
    """The name of the folder of a set of targets."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
