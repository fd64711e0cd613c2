"""How often targets in bfloat16 have the top token of those in float32: `target_precision`."""

from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch

from elm_trainer import ElmConfig, ElmTrainer
from elm_trainer.modeling import DEMO_MODEL, load_model_and_tokenizer

from .figures import Figure
from .live_targets import BATCH, SIDES
from .sides import common_settings
from .texts import released_texts


STRENGTHS = (1.0, 500.0, 1000.0)


def measure_target_precision(threads: int) -> dict[str, Any]:
    """Share of the positions of four forget texts at which the target's most probable token is that of float32, for the
    targets of a bfloat16 model as they are, and with `target_dtype="float32"`.

    Args:
        threads (`int`): Threads of PyTorch.

    Returns:
        `dict[str, Any]`: a figure for each of the two; a round is a strength η, whose values are in the report.
    """
    torch.set_num_threads(threads)
    tops: dict[str, list[torch.Tensor]] = {}
    side = replace(SIDES["smollm2-135m"], samples=BATCH)
    for name, dtype, target_dtype in (
        ("float32", "float32", None), ("bfloat16", "bfloat16", None), ("cast", "bfloat16", "float32"),
    ):  # fmt: skip
        model, tokenizer = load_model_and_tokenizer(DEMO_MODEL, dtype=dtype)
        tops[name] = []
        with TemporaryDirectory() as folder:
            settings = common_settings(folder, side) | {"precompute_targets": False, "target_dtype": target_dtype}
            trainer = ElmTrainer(
                model,
                ElmConfig(**settings),
                train_dataset=released_texts(side.samples),
                processing_class=tokenizer,
                peft_config=side.adapter.lora(),
            )
            batch = trainer.on_device(trainer.data_collator([trainer.train_dataset[row] for row in range(BATCH)]))
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
