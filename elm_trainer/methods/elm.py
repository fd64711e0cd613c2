"""Erasure of Language Memory (arXiv 2410.02760): config and trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils import logging
from trl import SFTConfig

from ..concept import Concept, load_concept
from ..data.collator import ElmDataCollator
from ..ops import (
    SparseDistribution,
    argmax_cross_entropy,
    erasure_target,
    kl_to_reference,
    position_weights,
    ramped_eta,
    soft_cross_entropy,
    top_k_distribution,
)
from .base import SUB_BATCHES, ErasureTrainer, batch_mean, check_columns, check_fields, position_nll, weighted_batches
from .teachers import Teacher


logger = logging.get_logger(__name__)

# What the paper reports and what its released code does (DESIGN §5). A field that is left out takes its preset's value.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"eta": 500.0, "eta_end": 500.0, "tau": 1.0, "top_k": 50, "retain_loss": "kl"},
    "released": {"eta": 1.0, "eta_end": 1000.0, "tau": 1.2, "top_k": 50, "retain_loss": "argmax"},
}


@dataclass
class ElmConfig(SFTConfig):
    r"""
    Configuration class for the [`ElmTrainer`].

    This class includes only the parameters that are specific to ELM. For a full list of training arguments, see
    [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        preset (`str`, *optional*, defaults to `"paper"`):
            `"paper"` or `"released"`: where the values of the five fields below that are left out come from.
        eta (`float`, *optional*):
            Strength η of the erasure: `t = b − η·(e − n)`. With the ramp, η of a text's first token.
        eta_end (`float`, *optional*):
            η of a text's last token; η is linear in between. Defaults to `eta` where only that is given.
        tau (`float`, *optional*):
            Temperature τ of the target.
        top_k (`int`, *optional*):
            Tokens of the target kept per position, and of the reference in the retain term.
        retain_loss (`str`, *optional*):
            `"kl"` to the reference, or `"argmax"`: cross-entropy with the reference's most probable token.
        plausibility (`float`, *optional*, defaults to `0.0`):
            Drop tokens less probable than this share of the most probable one under reference and novice. `0` gives
            the paper's target.
        fact_share (`float`, *optional*, defaults to `0.0`):
            Share of the erase term's weight that goes to positions in proportion to `KL(expert ‖ novice)`. `0` weighs
            all positions alike.
        erase_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the erase term. A weight of 0 skips a term's work altogether.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the retain term.
        consistency_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the consistency term; without synthetic pairs in the dataset there is none.
        concepts (`list[str]`, *optional*):
            Presets or YAML files of the concepts, matched with the column `concept` by name. Defaults to the presets
            the column names.
        contexts_per_sample (`int`, *optional*, defaults to `1`):
            Expert and novice contexts drawn per forget text; their log-probabilities are averaged.
        expert_steps (`int`, *optional*, defaults to `0`):
            Steps for which a throw-away expert adapter is fine-tuned on the forget texts, in place of the expert
            contexts. `0` uses contexts.
        novice_steps (`int`, *optional*, defaults to `0`):
            The same for a novice adapter on the column `novice` (the texts with permuted facts). With `0`, an expert
            adapter is compared with the reference itself.
        teacher_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the two throw-away adapters, decaying to 0.
        teacher_rank (`int`, *optional*, defaults to `16`):
            Rank of the two throw-away adapters.
        teacher_batch_size (`int`, *optional*, defaults to `8`):
            Texts per step of the two throw-away adapters.
        precompute_targets (`bool`, *optional*, defaults to `False`):
            Compute all targets once before training, so that a step needs no reference forward. Implied by
            `expert_steps`.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `learning_rate`: Defaults to `5e-5` instead of `2e-5`.
    """

    learning_rate: float = field(default=5e-5, metadata={"help": "The initial learning rate for AdamW."})

    preset: str = field(
        default="paper", metadata={"help": "Where left-out fields come from.", "choices": sorted(PRESETS)}
    )
    eta: float | None = field(default=None, metadata={"help": "Strength of the erasure (of the first token)."})
    eta_end: float | None = field(default=None, metadata={"help": "Strength of the erasure of the last token."})
    tau: float | None = field(default=None, metadata={"help": "Temperature of the target."})
    top_k: int | None = field(default=None, metadata={"help": "Tokens of the target kept per position."})
    retain_loss: str | None = field(default=None, metadata={"help": "Retain term.", "choices": ["kl", "argmax"]})
    plausibility: float = field(default=0.0, metadata={"help": "Plausibility constraint; 0 switches it off."})
    fact_share: float = field(default=0.0, metadata={"help": "Share of weight by KL(expert, novice)."})
    erase_weight: float = field(default=1.0, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})
    consistency_weight: float = field(default=1.0, metadata={"help": "Weight of the consistency term."})
    concepts: list[str] | None = field(default=None, metadata={"help": "Presets or YAML files of the concepts."})
    contexts_per_sample: int = field(default=1, metadata={"help": "Contexts drawn per forget text."})
    expert_steps: int = field(default=0, metadata={"help": "Steps of the throw-away expert adapter."})
    novice_steps: int = field(default=0, metadata={"help": "Steps of the throw-away novice adapter."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the adapters above."})
    teacher_rank: int = field(default=16, metadata={"help": "Rank of the adapters above."})
    teacher_batch_size: int = field(default=8, metadata={"help": "Texts per step of the adapters above."})
    precompute_targets: bool = field(default=False, metadata={"help": "Compute all targets before training."})

    def __post_init__(self):
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` is {self.preset!r}: use one of {', '.join(PRESETS)}.")
        if self.eta is not None and self.eta_end is None:
            self.eta_end = self.eta
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        check_fields(
            self,
            {
                "at least 0": ("eta", "eta_end", "expert_steps", "novice_steps"),
                "above 0": ("tau", "teacher_learning_rate"),
                "at least 1": ("top_k", "contexts_per_sample", "teacher_rank", "teacher_batch_size"),
                "from 0 to 1": ("plausibility", "fact_share"),
            },
        )
        if self.novice_steps and not self.expert_steps:
            raise ValueError(
                f"`novice_steps` is {self.novice_steps} without an expert adapter: set `expert_steps` too."
            )
        if self.expert_steps:
            self.precompute_targets = True


class ElmTrainer(ErasureTrainer):
    """Trainer for Erasure of Language Memory (ELM).

    `Loss = λe·erase + λr·retain + λc·consistency`, each the mean over texts of the mean over their positions:
    soft cross-entropy with [`erasure_target`] on forget text; KL (or argmax cross-entropy) to the reference on retain
    text; negative log-likelihood of the completion of synthetic pairs.

    Takes the arguments of [`~trl.SFTTrainer`] and raises what [`ErasureTrainer`] raises.

    Example:

    ```python
    trainer = ElmTrainer(
        model, ElmConfig("outputs"), train_dataset=dataset, processing_class=tokenizer, peft_config=LoraConfig(r=32)
    )
    trainer.train()
    ```
    """

    _name = "ELM"
    _config_class = ElmConfig
    args: ElmConfig

    def __init__(
        self,
        model,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        **kwargs,
    ):
        args = self.own_config(args)
        if args.expert_steps and eval_dataset is not None:
            raise ValueError(
                f"`eval_dataset` is given with `expert_steps={args.expert_steps}`, whose adapters are gone when training "
                "starts, so that only training rows have targets: leave one of the two out."
            )
        if not isinstance(model, str):
            vocabulary = model.config.get_text_config().vocab_size
            if args.top_k > vocabulary:
                raise ValueError(f"`top_k` is {args.top_k}, but the vocabulary has {vocabulary} tokens: lower it.")
        if data_collator is None:
            data_collator = ElmDataCollator(
                processing_class,
                concepts=None if args.expert_steps else _concepts(args, train_dataset),
                contexts_per_sample=args.contexts_per_sample,
                pad_to_multiple_of=args.pad_to_multiple_of,
                seed=args.seed,
            )
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        if args.precompute_targets:
            self.data_collator.targets = self._store_targets()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        weights = {
            "erase": self.args.erase_weight,
            "retain": self.args.retain_weight,
            "consistency": self.args.consistency_weight,
        }
        batches = weighted_batches(inputs, weights)
        targets = {
            term: batches[term].get("target") or self._target(model, term, batches[term])
            for term in ("erase", "retain")
            if term in batches
        }
        logits = self.forward_positions(model, batches)
        terms = {}
        if "erase" in logits:
            target = targets["erase"]
            losses = soft_cross_entropy(logits["erase"], SparseDistribution(target["indices"], target["probs"]))
            terms["erase"] = batch_mean(losses * target["weights"], batches["erase"])
        if "retain" in logits:
            target = targets["retain"]
            if self.args.retain_loss == "kl":
                losses = kl_to_reference(logits["retain"], SparseDistribution(target["indices"], target["probs"]))
            else:
                losses = argmax_cross_entropy(logits["retain"], target["indices"][:, 0])
            terms["retain"] = batch_mean(losses, batches["retain"])
        if "consistency" in logits:
            losses = position_nll(logits["consistency"], batches["consistency"])
            terms["consistency"] = batch_mean(losses, batches["consistency"])
        loss = self.weigh(terms, weights)
        return (loss, None) if return_outputs else loss

    def _target(self, model: nn.Module, term: str, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What the adapted model is to match on a sub-batch, from the reference (and the teachers)."""
        if term == "retain":
            logits = self.reference_positions(model, {"retain": batch})["retain"]
            return top_k_distribution(logits, self.args.top_k)._asdict()
        with self.reference(model):
            base = self.forward_positions(model, {"base": batch})["base"]
            if "expert" in batch:
                expert, novice = (
                    self._average_contexts(self.forward_positions(model, {side: batch[side]})[side], batch)
                    for side in ("expert", "novice")
                )
            else:
                expert, novice = (
                    base if teacher is None else teacher.logits(self, batch)
                    for teacher in (self._expert, self._novice)
                )
        texts = batch["input_ids"].size(0)
        # `ElmConfig.__post_init__` has filled what was left out.
        assert self.args.eta is not None and self.args.eta_end is not None and self.args.tau is not None
        eta: float | torch.Tensor = self.args.eta
        if self.args.eta_end != self.args.eta:
            mask = batch["attention_mask"]
            position = (mask.cumsum(-1) - 1)[batch["rows"], batch["columns"] + 1]
            eta = ramped_eta(position, mask.sum(-1)[batch["rows"]], self.args.eta, self.args.eta_end)
        target = erasure_target(
            base, expert, novice, eta=eta, temperature=self.args.tau, top_k=self.args.top_k,
            plausibility=self.args.plausibility,
        )  # fmt: skip
        weights = position_weights(expert, novice, batch["rows"], texts, self.args.fact_share)
        return {**target._asdict(), "weights": weights}

    def _average_contexts(self, logits: torch.Tensor, batch: Mapping[str, Any]) -> torch.Tensor:
        """Mean over a text's contexts of its log-probabilities, `[positions, vocab]`."""
        contexts = self.args.contexts_per_sample
        if contexts == 1:
            return logits
        # Rows of the contexts follow each other text by text: text 0 context 0, text 0 context 1, ...
        log_probs = logits.float().log_softmax(-1)
        rows = batch["rows"]
        counts = torch.bincount(rows, minlength=batch["input_ids"].size(0))
        starts = (counts.cumsum(0) - counts)[rows]
        place = torch.arange(len(rows), device=rows.device) - starts
        first = contexts * starts + place
        return torch.stack([log_probs[first + k * counts[rows]] for k in range(contexts)]).mean(0)

    @property
    def _expert(self) -> "Teacher | None":
        return self._teachers.get("expert")

    @property
    def _novice(self) -> "Teacher | None":
        return self._teachers.get("novice")

    def _store_targets(self) -> list[dict[str, torch.Tensor]]:
        """Targets of every training row, on the CPU; the throw-away adapters live only for this pass."""
        self._teachers: dict[str, Teacher] = {}
        sides: tuple[tuple[Literal["expert", "novice"], int, str], ...] = (
            ("expert", self.args.expert_steps, "forget_ids"),
            ("novice", self.args.novice_steps, "novice_ids"),
        )
        for side, steps, column in sides:
            if steps:
                self._teachers[side] = Teacher.fit(self, side, list(self.train_dataset[column]), steps)
        weights = {"erase": self.args.erase_weight, "retain": self.args.retain_weight}

        def targets(inputs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
            parts: list[dict[str, torch.Tensor]] = [{} for _ in inputs["forget"]["lengths"]]
            for term, batch in weighted_batches(inputs, weights).items():
                counts = torch.bincount(batch["rows"], minlength=len(parts)).tolist()
                for key, value in self._target(self.model, term, batch).items():
                    for part, piece in zip(parts, value.cpu().split(counts), strict=True):
                        part[f"{SUB_BATCHES[term]}_{key}"] = piece.clone()
            return parts

        stored = self.precompute(targets, "Computing targets")
        for teacher in self._teachers.values():
            teacher.remove()
        self._teachers = {}
        return stored


def _concepts(args: ElmConfig, dataset: Any) -> dict[str, Concept]:
    if dataset is not None:
        check_columns("train_dataset", dataset)
    names = set(dataset.unique("concept")) if dataset is not None and "concept" in dataset.column_names else set()
    concepts = {concept.name: concept for concept in map(load_concept, args.concepts or sorted(names))}
    if missing := names - set(concepts):
        raise ValueError(f"`concepts` is {args.concepts}, but the dataset also names {sorted(missing)}: add them.")
    return concepts
