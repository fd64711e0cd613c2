"""Time until the demo's quality is reached, our recipe against the released one: `time_to_quality_vs_released`."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elm_trainer import (
    ConceptSources,
    ElmConfig,
    ElmTrainer,
    build_erasure_dataset,
    built_in_suite,
    load_concept,
    load_model_and_tokenizer,
)
from elm_trainer.evaluation.likelihood import score_choices
from elm_trainer.modeling import layer_range

from .released_loop import released_updates, tokenize_samples
from .report import Figure
from .shapes import Adapter
from .workers import Lap, PacedTraining, Pacer, workers


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
# The built-in pairs serve both sides: making pairs is not part of the training that is compared.
PAIRS = "capitals-fluent"
# What is to be forgotten, and what is to be kept.
BANKS = ("capitals", "geography")
# Dev questions of each of them, and updates of the released loop between two looks at these. Asking is not timed.
QUESTIONS, EVERY = 60, 20


@dataclass(frozen=True)
class Recipe:
    """What a recipe says, read without the script that it is written for."""

    path: str
    overrides: dict[str, Any] = field(default_factory=dict)  # what is to be otherwise

    @property
    def record(self) -> dict[str, Any]:
        return yaml.safe_load(Path(self.path).read_text(encoding="utf-8")) | self.overrides

    def config(self, folder: str) -> ElmConfig:
        known = ElmConfig.__dataclass_fields__
        return ElmConfig(**{k: v for k, v in self.record.items() if k in known} | {"output_dir": f"{folder}/run"})

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer, and the precision of products for this process."""
        record = self.record
        torch.set_float32_matmul_precision(record.get("matmul_precision", "highest"))
        attention = record.get("attn_implementation")
        return load_model_and_tokenizer(record["model"], dtype="float32", attn_implementation=attention)

    def adapter(self) -> Adapter:
        record = self.record
        layers = tuple(layer_range(record["lora_layers"]) or ())
        dropout, targets = record.get("lora_dropout", 0.0), tuple(record["lora_targets"].split(","))
        return Adapter(record["lora_rank"], layers, record["lora_alpha"], dropout, targets)

    def dataset(self, tokenizer: PreTrainedTokenizerBase):
        record = self.record
        [concept], [forget] = record["concepts"], record["forget"]
        sources = {concept: ConceptSources(forget, record["retain"], PAIRS)}
        return build_erasure_dataset(
            sources, size=record["dataset_size"], processing_class=tokenizer, seed=record["seed"]
        )


OURS = Recipe(str(RECIPES / "smollm2-135m-capitals-log-space.yaml"))
# With the arithmetic of ours, which is faster for single texts too.
RELEASED = Recipe(
    str(RECIPES / "smollm2-135m-capitals-released.yaml"),
    {name: OURS.record.get(name) for name in ("bf16", "use_cpu", "attn_implementation")},
)


def train_ours(pacer: Pacer, folder: str, recipe: Recipe, questions: int) -> None:
    """Train a recipe, with everything that it needs made in this process: targets, directions and their cache."""
    model, tokenizer = recipe.load()
    lap = Lap(pacer, "texts and targets")
    trainer = ElmTrainer(
        model,
        recipe.config(folder),
        train_dataset=recipe.dataset(tokenizer),
        processing_class=tokenizer,
        peft_config=recipe.adapter().lora(),
        callbacks=[lap, PacedTraining(pacer)],
    )
    pacer.measure = _asks(trainer.accelerator.unwrap_model(trainer.model), tokenizer, questions)
    trainer.train()


def train_released(pacer: Pacer, folder: str, recipe: Recipe, questions: int) -> None:
    """Train a recipe's data, adapter and rate in the released loop: one text at a time, four to an update, no schedule."""
    record, config = recipe.record, recipe.config(folder)
    model, tokenizer = recipe.load()
    started = time.perf_counter()
    rows = recipe.dataset(tokenizer).shuffle(record["seed"]).to_list()
    [concept] = record["concepts"]
    samples = tokenize_samples(rows, load_concept(concept), tokenizer, record["seed"], config.max_length)
    peft_model = get_peft_model(model, recipe.adapter().lora())
    pacer.lap("texts", time.perf_counter() - started)
    pacer.measure = _asks(peft_model, tokenizer, questions)
    assert config.eta is not None and config.eta_end is not None and config.tau is not None and config.top_k
    if pacer.start():
        released_updates(
            peft_model,
            samples,
            learning_rate=config.learning_rate,
            eta=config.eta,
            eta_end=config.eta_end,
            tau=config.tau,
            top_k=config.top_k,
            on_update=pacer.step,
        )


def measure_quality(threads: int, budget: float) -> dict[str, Any]:
    """Train our recipe to its end, then the released one until it is as good or the budget is spent.

    As good is to rank no more capitals rightly and no less of the geography around them, which a model that is merely
    broken would not. Where the released loop does not get there in `budget` seconds of training, the figure is a lower bound and says so.
    """
    with workers({"ours": (train_ours, (OURS, QUESTIONS))}, threads) as started:
        worker = started["ours"]
        block = worker.run(OURS.record["max_steps"])
        setup = worker.ready["setup"]
    goal, taken = {name: block[name] for name in BANKS}, sum(setup.values()) + block["seconds"]
    looks = []
    with workers({"released": (train_released, (RELEASED, QUESTIONS))}, threads) as started:
        worker = started["released"]
        seconds, updates, reached = sum(worker.ready["setup"].values()), 0, False
        while seconds < budget and not reached:
            block = worker.run(EVERY)
            seconds, updates = seconds + block["seconds"], updates + EVERY
            reached = block["capitals"] <= goal["capitals"] and block["geography"] >= goal["geography"]
            looks.append({"updates": updates, "seconds": seconds, **{name: block[name] for name in BANKS}})
    return Figure(
        "seconds to our recipe's accuracies (PMI, dev questions), released recipe in the released loop / ours",
        [seconds / taken],
        at_least=10,
        bound=not reached,
        details={
            "goal": goal,
            "seconds": {"ours": taken, "released": seconds},
            "setup_seconds": setup,
            "budget_seconds": budget,
            "released": looks,
        },
    ).record()


def _asks(model: PeftModel, tokenizer: PreTrainedTokenizerBase, questions: int):
    suite = built_in_suite(["capitals"], questions, split="dev")

    def ask() -> dict[str, float]:
        answers = {name: score_choices(model, tokenizer, suite.banks[name]).pmi for name in BANKS}
        return {name: sum(rights) / len(rights) for name, rights in answers.items()}

    return ask
