"""ELM's targets, as they are kept on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..data.target_store import Field, TargetLayout
from .base import SUB_BATCHES, weighted_batches
from .targets import TargetPlan
from .teachers import Teacher


if TYPE_CHECKING:
    from .elm import ElmConfig, ElmTrainer

# What the targets depend on, beside the contexts and the teachers.
_SETTINGS = ("eta", "eta_end", "tau", "top_k", "plausibility", "fact_share", "retain_loss", "novice", "log_tokens")
_TEACHER_SETTINGS = (
    "expert_steps", "novice_steps", "teacher_learning_rate", "teacher_rank", "teacher_batch_size", "seed",
)  # fmt: skip


def elm_target_plan(trainer: "ElmTrainer") -> TargetPlan:
    """What [`ElmTrainer`] keeps: the target of each position of forget text with its weight, and the reference's most
    probable tokens at each position of retain text (the first alone where `retain_loss` is `"argmax"`, and what enters
    the head where it is `"log"`).
    """
    args = trainer.args
    config = trainer.model.config.get_text_config()
    layout = _layout(args, config.vocab_size, config.hidden_size)
    names = [*_SETTINGS, *(_TEACHER_SETTINGS if args.expert_steps and args.erase_weight else ())]
    columns = []
    if args.erase_weight:
        columns += ["concept", "forget_ids", *(["novice_ids"] if args.novice_steps else [])]
        columns += ["novices_ids"] if args.novice == "counterfactual" else []
    if args.retain_weight:
        columns += ["retain_ids", "retain_start"]
    return TargetPlan(
        switch="precompute_targets",
        layout=layout,
        # The version is that of what is made from the settings.
        settings={"method": "ELM", "version": 3, **{name: getattr(args, name) for name in names}},
        columns=columns,
        targets_dir=args.targets_dir,
        compute=partial(_compute, trainer, layout),
        contexts=bool(args.erase_weight) and args.novice == "contexts",
        prepare=partial(_teachers, trainer),
    )


def _layout(args: "ElmConfig", vocab_size: int, hidden_size: int) -> TargetLayout:
    fields: dict[str, Field] = {}
    for side, weight, top_k in (
        ("forget", args.erase_weight, args.top_k),
        ("retain", args.retain_weight, 1 if args.retain_loss == "argmax" else args.top_k),
    ):
        if weight and (args.retain_loss == "log" if side == "retain" else args.log_tokens):
            fields[f"{side}_states"] = Field("halves", hidden_size)
        elif weight:
            fields |= {f"{side}_indices": Field("ids", top_k), f"{side}_probs": Field("probs", top_k)}
    if args.erase_weight:
        fields["forget_weights"] = Field("floats")
        if args.log_tokens:
            fields["forget_indices"] = Field("ids", args.log_tokens)
            fields["forget_log_probs"] = Field("floats", args.log_tokens)
    return TargetLayout(fields, vocab_size)


def _compute(trainer: "ElmTrainer", layout: TargetLayout, inputs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """The targets of each row of a batch, on the CPU."""
    weights = {"erase": trainer.args.erase_weight, "retain": trainer.args.retain_weight}
    parts: list[dict[str, torch.Tensor]] = [{} for _ in inputs["forget"]["lengths"]]
    for term, batch in weighted_batches(inputs, weights).items():
        counts = torch.bincount(batch["rows"], minlength=len(parts)).tolist()
        for key, values in trainer._target(trainer.model, term, batch).items():
            name = f"{SUB_BATCHES[term]}_{key}"
            if values.dim() == 2:
                values = values[:, : layout.fields[name].width]
            for part, piece in zip(parts, values.cpu().split(counts), strict=True):
                part[name] = piece
    return parts


@contextmanager
def _teachers(trainer: "ElmTrainer") -> Iterator[None]:
    """The throw-away adapters, tuned on entry and gone on exit."""
    args = trainer.args
    sides = (("expert", args.expert_steps, "forget_ids"), ("novice", args.novice_steps, "novice_ids"))
    try:
        for side, steps, column in sides:
            if steps and args.erase_weight:
                trainer._teachers[side] = Teacher.fit(trainer, side, list(trainer.train_dataset[column]), steps)
        yield
    finally:
        for teacher in trainer._teachers.values():
            teacher.remove()
        trainer._teachers.clear()
