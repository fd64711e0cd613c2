"""What is run once where it was run again and again: beginnings that texts share, and layers that both sides share: `sharing`."""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from elm_trainer import ConceptSources, ElmConfig, ElmTrainer, build_erasure_dataset, load_model_and_tokenizer
from elm_trainer.data.facts import load_bank
from elm_trainer.evaluation.likelihood import score_choices
from elm_trainer.evaluation.pair import SIDES, ModelPair
from elm_trainer.methods.forward import weighted_batches
from elm_trainer.modeling import DEMO_MODEL, lora_config

from .figures import Figure, ratios


# The demo's texts and its adapter.
ROWS, LAYER, QUESTIONS = 64, 23, 64
RETAIN = [
    "countries-quiz",
    "cities",
    "everyday",
    "capitals-near",
    "countries-quiz",
    "places",
    "everyday",
    "cities",
    "quiz",
]


def measure_sharing(repeats: int, threads: int) -> dict[str, Any]:
    """Seconds with sharing / without, which take turns, of SmolLM2-135M's targets and of its multiple choice with the adapter.

    Args:
        repeats (`int`): Rounds.
        threads (`int`): Threads of PyTorch.

    Returns:
        `dict[str, Any]`: a figure for each.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, tokenizer = load_model_and_tokenizer(DEMO_MODEL)
    dataset = build_erasure_dataset(
        {"capitals": ConceptSources("capitals", RETAIN)}, size=ROWS, processing_class=tokenizer
    )
    with TemporaryDirectory() as folder:
        trainer = ElmTrainer(
            model,
            ElmConfig(
                folder, novice="counterfactual", erase_weight=0.0, state_weight=1.0, state_layers=[LAYER],
                retain_loss="states", consistency_weight=0.0, max_length=80, precompute_targets=False,
                per_device_train_batch_size=ROWS, use_cpu=True, bf16=True, activation_checkpointing=False, report_to="none",
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora_config(model, rank=64, targets="q_proj,k_proj,v_proj,o_proj", layers=str(LAYER)),
        )  # fmt: skip
        return {"sharing_targets": _targets(trainer, repeats), "sharing_choices": _choices(trainer, repeats)}


def _targets(trainer: ElmTrainer, repeats: int) -> dict[str, Any]:
    tokens: list[int] = []

    def make(sharing: bool) -> None:
        batch = trainer.data_collator(list(trainer.train_dataset))
        inputs = trainer.on_device(batch, sharing=sharing)
        with torch.no_grad(), trainer.accelerator.autocast():
            trainer.targets(trainer.model, weighted_batches(inputs, {"erase": 1.0, "retain": 1.0}))

    handle = trainer.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: tokens.append(args[0].numel())
    )
    counts = {}
    try:
        make(True)  # measures the model in forwards of its own
        for sharing in (True, False):
            tokens.clear()
            make(sharing)
            counts["shared" if sharing else "alone"] = sum(tokens)
    finally:
        handle.remove()
    seconds = _in_turns({"shared": partial(make, True), "alone": partial(make, False)}, repeats)
    return _figure(
        f"seconds of targets of {ROWS} rows, texts sharing what they begin with / each alone", seconds, counts
    )


def _choices(trainer: ElmTrainer, repeats: int) -> dict[str, Any]:
    model, tokenizer = trainer.model, trainer.processing_class
    questions = load_bank("capitals", split="test")[:QUESTIONS]
    pair = ModelPair(model.to(torch.bfloat16))

    def ask(sharing: bool) -> None:
        with pair.sharing_layers() if sharing else nullcontext():
            for side in SIDES:
                with pair.use(side) as one:
                    score_choices(one, tokenizer, questions, sharing=partial(pair.below.run, side))

    seconds = _in_turns({"shared": partial(ask, True), "alone": partial(ask, False)}, repeats)
    meaning = f"seconds of multiple choice of both sides, sharing the layers below {LAYER} / each running all"
    return _figure(meaning, seconds, {})


def _in_turns(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {key: [] for key in sides}
    for make in sides.values():
        make()
    for _ in range(repeats):
        for key, make in sides.items():
            start = time.perf_counter()
            make()
            seconds[key].append(time.perf_counter() - start)
    return seconds


def _figure(meaning: str, seconds: dict[str, list[float]], tokens: dict[str, int]) -> dict[str, Any]:
    details: dict[str, Any] = {"seconds": {key: statistics.median(values) for key, values in seconds.items()}}
    return Figure(meaning, ratios(seconds["shared"], seconds["alone"]), details=details | {"tokens": tokens}).record()
