"""How targets are made: in one forward of the reference or in four (`live_targets`), in which precision (`target_precision`), and
with what texts share run once, as layers that both sides of an evaluation share are (`sharing`).
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from elm_trainer import (
    ConceptSources,
    ElmConfig,
    ElmTrainer,
    build_erasure_dataset,
    load_bank,
    load_model_and_tokenizer,
)
from elm_trainer.evaluation.likelihood import score_choices
from elm_trainer.evaluation.pair import SIDES as MODEL_SIDES
from elm_trainer.evaluation.pair import ModelPair
from elm_trainer.head import STATES, Plan
from elm_trainer.methods.elm import context_places
from elm_trainer.methods.forward import supervised_places, weighted_batches
from elm_trainer.modeling import DEMO_MODEL, lora_config

from .quality import RECIPES
from .report import Figure, medians, ratios, seconds_in_turns
from .sides import RELEASED_ADAPTER, Side, common_settings, model_of
from .step import SIDE


BATCH = 4
SIDES = {
    "small": replace(SIDE, samples=BATCH, short=False),
    "smollm2-135m": Side("elm", BATCH, BATCH, adapter=replace(RELEASED_ADAPTER, rank=8)),
}
STRENGTHS = (1.0, 500.0, 1000.0)
# The demo's adapter, and so many of its rows.
ROWS, LAYER, QUESTIONS = 64, 23, 64


def _trainer(
    side: Side, folder: str, model: Any, tokenizer: Any, **settings: Any
) -> tuple[ElmTrainer, dict[str, Any]]:
    """A trainer that stores no targets, and a batch of its texts."""
    trainer = ElmTrainer(
        model,
        ElmConfig(**common_settings(folder, side), precompute_targets=False, **settings),
        train_dataset=side.texts,
        processing_class=tokenizer,
        peft_config=side.adapter.lora(),
    )
    return trainer, trainer.on_device(trainer.data_collator([trainer.train_dataset[row] for row in range(BATCH)]))


def four_forwards(trainer: ElmTrainer, batches: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """The targets of both terms, with a forward for each of the expert, the novice, the plain text and the retain text."""
    forget, model = batches["erase"], trainer.model
    contexts = []
    with trainer.reference(model):
        for side in ("expert", "novice"):
            states = trainer.forward_positions(model, {side: forget[side]}, {side: STATES})[side]
            own = supervised_places(forget[side])
            # Both rise, so that a place's index among the supervised ones can be searched for.
            places = context_places(forget, side, trainer.args.contexts_per_sample)
            contexts += [states[torch.searchsorted(own, place)] for place in places]
        plan = Plan(trainer.erase_reading(forget), contexts, states=0 if trainer.args.log_tokens else None)
        found = trainer.forward_positions(model, {"erase": forget}, {"erase": plan})["erase"]
    return {"erase": trainer.erase_target(found, forget), "retain": trainer.target(model, "retain", batches["retain"])}


def measure_live_targets(repeats: int, threads: int) -> dict[str, Any]:
    """Seconds of making the targets of four samples, in one forward / in four, of a small model of random weights and of the demo's."""
    torch.set_num_threads(threads)
    figures = {}
    for name, side in SIDES.items():
        torch.manual_seed(0)
        model, tokenizer = model_of(side)
        with TemporaryDirectory() as folder:
            trainer, inputs = _trainer(side, folder, model, tokenizer)
            batches = {"erase": inputs["forget"], "retain": inputs["retain"]}
            sides = {
                "one": partial(trainer.targets, trainer.model, batches),
                "four": partial(four_forwards, trainer, batches),
            }
            made = {key: make() for key, make in sides.items()}
            seconds = seconds_in_turns(sides, repeats)
        figures[f"live_targets_{name}"] = Figure(
            f"seconds of live targets in one forward / in four, {name}, {BATCH} samples",
            ratios(seconds["one"], seconds["four"]),
            details={
                "seconds": medians(seconds),
                "largest_difference": max(
                    (made["one"][term][key].float() - other.float()).abs().max().item()
                    for term, target in made["four"].items()
                    for key, other in target.items()
                    if key != "indices"
                ),
            },
        ).record()
    return figures


def measure_target_precision(threads: int) -> dict[str, Any]:
    """Share of the positions of four forget texts at which the target's most probable token is that of float32, for the
    targets of a bfloat16 model as they are, and with `target_dtype="float32"`; a round is a strength η.
    """
    torch.set_num_threads(threads)
    tops: dict[str, list[torch.Tensor]] = {}
    for name, dtype, target_dtype in (
        ("float32", "float32", None), ("bfloat16", "bfloat16", None), ("cast", "bfloat16", "float32"),
    ):  # fmt: skip
        model, tokenizer = load_model_and_tokenizer(DEMO_MODEL, dtype=dtype)
        tops[name] = []
        with TemporaryDirectory() as folder:
            trainer, batch = _trainer(SIDES["smollm2-135m"], folder, model, tokenizer, target_dtype=target_dtype)
            for eta in STRENGTHS:
                trainer.args.eta = trainer.args.eta_end = eta
                tops[name].append(trainer.target(trainer.model, "erase", batch["forget"])["indices"][:, 0])
    figures = {}
    for name, meaning in (
        ("bfloat16", "a bfloat16 model"),
        ("cast", 'a bfloat16 model with `target_dtype="float32"`'),
    ):
        shares = [(own == exact).float().mean().item() for own, exact in zip(tops[name], tops["float32"], strict=True)]
        figures[f"target_precision_{name}"] = Figure(
            f"positions whose target's top token is that of float32, {meaning}, at η = 1, 500 and 1000",
            shares,
            details={"positions": len(tops[name][0]), "eta": list(STRENGTHS)},
        ).record()
    return figures


def measure_sharing(repeats: int, threads: int) -> dict[str, Any]:
    """Seconds with sharing / without, which take turns, of SmolLM2-135M's targets and of its multiple choice with the adapter."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, tokenizer = load_model_and_tokenizer(DEMO_MODEL)
    retain = yaml.safe_load((RECIPES / "smollm2-135m-capitals.yaml").read_text(encoding="utf-8"))["retain"]
    dataset = build_erasure_dataset(
        {"capitals": ConceptSources("capitals", retain)}, size=ROWS, processing_class=tokenizer
    )
    with TemporaryDirectory() as folder:
        trainer = ElmTrainer(
            model,
            ElmConfig(
                folder, novice="counterfactual", erase_weight=0.0, state_weight=1.0, state_layers=[LAYER],
                retain_loss="states", consistency_weight=0.0, max_length=80, precompute_targets=False,
                per_device_train_batch_size=ROWS, use_cpu=True, activation_checkpointing=False, report_to="none",
            ),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora_config(model, rank=64, targets="q_proj,k_proj,v_proj,o_proj", layers=str(LAYER)),
        )  # fmt: skip
        return {"sharing_targets": _targets(trainer, repeats), "sharing_choices": _choices(trainer, repeats)}


def _targets(trainer: ElmTrainer, repeats: int) -> dict[str, Any]:
    tokens: list[int] = []

    def make(sharing: bool) -> None:
        inputs = trainer.on_device(trainer.data_collator(list(trainer.train_dataset)), sharing=sharing)
        with torch.no_grad(), trainer.accelerator.autocast():
            trainer.targets(trainer.model, weighted_batches(inputs, {"erase": 1.0, "retain": 1.0}))

    counts = {}
    make(True)  # measures the model in forwards of its own
    embeddings = trainer.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: tokens.append(args[0].numel()))
    for name, sharing in (("shared", True), ("alone", False)):
        tokens.clear()
        make(sharing)
        counts[name] = sum(tokens)
    handle.remove()
    seconds = seconds_in_turns({"shared": partial(make, True), "alone": partial(make, False)}, repeats)
    meaning = f"seconds of targets of {ROWS} rows, texts sharing what they begin with / each alone"
    return _shared_figure(meaning, seconds, counts)


def _choices(trainer: ElmTrainer, repeats: int) -> dict[str, Any]:
    model, tokenizer = trainer.model, trainer.processing_class
    questions = load_bank("capitals", split="test")[:QUESTIONS]
    pair = ModelPair(model.to(torch.bfloat16))

    def ask(sharing: bool) -> None:
        with pair.sharing_layers() if sharing else nullcontext():
            for side in MODEL_SIDES:
                with pair.use(side) as one:
                    score_choices(one, tokenizer, questions, sharing=partial(pair.below.run, side))

    seconds = seconds_in_turns({"shared": partial(ask, True), "alone": partial(ask, False)}, repeats)
    meaning = f"seconds of multiple choice of both sides, sharing the layers below {LAYER} / each running all"
    return _shared_figure(meaning, seconds, {})


def _shared_figure(meaning: str, seconds: Mapping[str, list[float]], tokens: dict[str, int]) -> dict[str, Any]:
    details = {"seconds": medians(seconds), "tokens": tokens}
    return Figure(meaning, ratios(seconds["shared"], seconds["alone"]), details=details).record()
