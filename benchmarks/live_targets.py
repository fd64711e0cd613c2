"""Targets that are made in the step, in one forward of the reference or in four: `live_targets`."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch

from elm_trainer import ElmConfig, ElmTrainer
from elm_trainer.methods.elm import context_places
from elm_trainer.methods.forward import supervised_places
from elm_trainer.ops import STATES

from .figures import Figure, ratios
from .growth import SIDE
from .sides import RELEASED_ADAPTER, Side, common_settings, model_of
from .texts import released_texts


BATCH = 4
SIDES = {
    "small": replace(SIDE, samples=BATCH, short=False),
    "smollm2-135m": Side("elm", BATCH, BATCH, adapter=replace(RELEASED_ADAPTER, rank=8)),
}


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
        reading = trainer.erase_reading(forget)
        whole = ("erase",) if trainer.args.log_tokens else ()
        found = trainer.forward_positions(
            model, {"erase": forget}, {"erase": reading}, {"erase": contexts}, {}, states=whole
        )["erase"]
    return {"erase": trainer.erase_target(found, forget), "retain": trainer.target(model, "retain", batches["retain"])}


def measure_live_targets(repeats: int, threads: int) -> dict[str, Any]:
    """Seconds of making the targets of four samples, in one forward / in four, which take turns.

    Args:
        repeats (`int`): Rounds.
        threads (`int`): Threads of PyTorch.

    Returns:
        `dict[str, Any]`: a figure for a small model of random weights and one for SmolLM2-135M.
    """
    torch.set_num_threads(threads)
    figures = {}
    for name, side in SIDES.items():
        torch.manual_seed(0)
        model, tokenizer = model_of(side)
        with TemporaryDirectory() as folder:
            trainer = ElmTrainer(
                model,
                ElmConfig(precompute_targets=False, **common_settings(folder, side)),
                train_dataset=released_texts(side.samples),
                processing_class=tokenizer,
                peft_config=side.adapter.lora(),
            )
            inputs = trainer.on_device(trainer.data_collator([trainer.train_dataset[row] for row in range(BATCH)]))
            batches = {"erase": inputs["forget"], "retain": inputs["retain"]}
            sides = {
                "one": lambda trainer=trainer, batches=batches: trainer.targets(trainer.model, batches),
                "four": lambda trainer=trainer, batches=batches: four_forwards(trainer, batches),
            }
            made = {key: make() for key, make in sides.items()}
            largest = max(
                (made["one"][term][key].float() - other.float()).abs().max().item()
                for term, target in made["four"].items()
                for key, other in target.items()
                if key != "indices"
            )
            seconds: dict[str, list[float]] = {key: [] for key in sides}
            for _ in range(repeats):
                for key, make in sides.items():
                    start = time.perf_counter()
                    make()
                    seconds[key].append(time.perf_counter() - start)
        figures[f"live_targets_{name}"] = Figure(
            f"seconds of live targets in one forward / in four, {name}, {BATCH} samples",
            ratios(seconds["one"], seconds["four"]),
            details={
                "seconds": {key: statistics.median(values) for key, values in seconds.items()},
                "largest_difference": largest,
            },
        ).record()
    return figures
