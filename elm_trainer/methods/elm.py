"""Erasure of Language Memory (arXiv 2410.02760): config and trainer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..concept import Concept, load_concept
from ..data.collator import ElmDataCollator
from ..ops import (
    STATES,
    LogTarget,
    Reading,
    SparseDistribution,
    argmax_cross_entropy,
    disagreement,
    erasure_target,
    kl_to_reference,
    log_mean_probs,
    log_space_divergence,
    log_space_loss,
    log_space_target,
    mean_log_probs,
    position_weights,
    ramped_eta,
    soft_cross_entropy,
    top_k_distribution,
)
from .base import ErasureConfig, ErasureTrainer, batch_mean, nll_reading, weighted_batches
from .contrast import contrast_adapter
from .elm_targets import elm_target_plan
from .teachers import Teacher
from .validation import check_columns, check_fields, load_given, named_datasets


logger = logging.get_logger(__name__)

# What the paper reports and what its released code does (DESIGN §5). A field that is left out takes its preset's value.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"eta": 500.0, "eta_end": 500.0, "tau": 1.0, "top_k": 50, "retain_loss": "kl"},
    "released": {"eta": 1.0, "eta_end": 1000.0, "tau": 1.2, "top_k": 50, "retain_loss": "argmax"},
}


@dataclass
class ElmConfig(ErasureConfig):
    r"""
    Configuration class for the [`ElmTrainer`].

    This class includes only the parameters that are specific to ELM. For a full list of training arguments, see
    [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`].

    Parameters:
        preset (`str`, *optional*, defaults to `"paper"`):
            `"paper"` or `"released"`: where the values of the five fields below that are left out come from.
        eta (`float`, *optional*):
            Strength η of the erasure: `t = b − η·(e − n)`. With the ramp, η of the prediction behind a text's first token.
        eta_end (`float`, *optional*):
            η of the prediction behind a text's last token; η is linear in between. Defaults to `eta` where only that is given.
        tau (`float`, *optional*):
            Temperature τ of the target.
        top_k (`int`, *optional*):
            Tokens of the target kept per position, and of the reference in the retain term.
        retain_loss (`str`, *optional*):
            `"kl"` to the reference; `"argmax"`: cross-entropy with the reference's most probable token; or `"log"`: KL
            and half the variance of the change of log-probabilities over the vocabulary ([`log_space_divergence`]), which
            keeps the ranking of improbable tokens too. A stored target of `"log"` is `hidden` numbers a position.
        plausibility (`float`, *optional*, defaults to `0.0`):
            Drop tokens less probable than this share of the most probable one under reference and novice. `0` gives
            the paper's target.
        fact_share (`float`, *optional*, defaults to `0.0`):
            Share of the erase term's weight that goes to positions in proportion to `KL(expert ‖ novice)`. `0` weighs
            all positions alike.
        novice (`str`, *optional*, defaults to `"contexts"`):
            What the novice is: `"contexts"`, the reference behind a novice context (and the expert behind an expert
            context), as in the paper; or `"counterfactual"`, the reference on the same text with the concept's own terms
            replaced (column `novices` of [`build_erasure_dataset`]), its mean probabilities over the draws at the
            positions that all of them share with the text. The expert is then the reference itself.
        log_tokens (`int`, *optional*, defaults to `0`):
            Take the equation of the erase term in log space, at so many tokens of largest `e − n` a position
            ([`log_space_target`]), and hold all other tokens to the reference's odds, the improbable ones too
            ([`log_space_divergence`]). Then `tau` and `top_k` have no part in the erase term. `0` gives the paper's loss.
        log_strength (`float`, *optional*, defaults to `2.0`):
            Weight of those tokens ([`log_space_loss`]) beside all others in the erase term.
        contrast_rows (`int`, *optional*, defaults to `0`):
            Rows on which the adapter's input directions are chosen before training ([`contrast_adapter`]): those that
            are strong on forget text and weak on retain text. They are then kept, so that only LoRA's B is trained, and
            the adapter can hardly answer to anything else. `0` leaves PEFT's random directions, which are trained.
        contrast_damping (`float`, *optional*, defaults to `0.1`):
            Share of the mean variance on retain text that is added in every direction there, so that directions that
            are rare in both do not win.
        erase_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the erase term. A weight of 0 skips a term's work altogether.
        retain_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the retain term.
        retain_focus (`float`, *optional*, defaults to `0.0`):
            Share of the retain term's weight that goes to the positions of a text in proportion to how far they have
            moved from the reference, so that answers are not lost among the words around them. `0` weighs all alike.
        consistency_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the consistency term; without synthetic pairs in the dataset there is none.
        concepts (`list[str]`, *optional*):
            Presets or YAML files of the concepts, matched with the column `concept` by name. Defaults to what that column
            names, with the keywords of the column `keywords` where there is one ([`Concept`] in [`build_erasure_dataset`]).
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
        precompute_targets (`bool`, *optional*):
            Compute all targets once before training and keep them on disk for every run with the same model, data and
            settings, so that a step needs no reference forward. By default this is done where training visits every row
            at least once, and they fit into half of the free disk and 64 GiB. Implied by `expert_steps`.
        targets_dir (`str`, *optional*):
            Folder in which targets are kept, each set of them under a name that says all they depend on. All processes
            must see it. Defaults to `elm_targets` in the cache of `datasets`.

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
    retain_loss: str | None = field(
        default=None, metadata={"help": "Retain term.", "choices": ["kl", "argmax", "log"]}
    )
    plausibility: float = field(default=0.0, metadata={"help": "Plausibility constraint; 0 switches it off."})
    fact_share: float = field(default=0.0, metadata={"help": "Share of weight by KL(expert, novice)."})
    novice: str = field(
        default="contexts", metadata={"help": "What the novice is.", "choices": ["contexts", "counterfactual"]}
    )
    log_tokens: int = field(default=0, metadata={"help": "Tokens matched in log space; 0 gives the paper's loss."})
    log_strength: float = field(default=2.0, metadata={"help": "Weight of those tokens."})
    contrast_rows: int = field(default=0, metadata={"help": "Rows that choose the adapter's directions; 0 for none."})
    contrast_damping: float = field(default=0.1, metadata={"help": "Damping of the choice of directions."})
    erase_weight: float = field(default=1.0, metadata={"help": "Weight of the erase term."})
    retain_weight: float = field(default=1.0, metadata={"help": "Weight of the retain term."})
    retain_focus: float = field(default=0.0, metadata={"help": "Share of weight by how far a position has moved."})
    consistency_weight: float = field(default=1.0, metadata={"help": "Weight of the consistency term."})
    concepts: list[str] | None = field(default=None, metadata={"help": "Presets or YAML files of the concepts."})
    contexts_per_sample: int = field(default=1, metadata={"help": "Contexts drawn per forget text."})
    expert_steps: int = field(default=0, metadata={"help": "Steps of the throw-away expert adapter."})
    novice_steps: int = field(default=0, metadata={"help": "Steps of the throw-away novice adapter."})
    teacher_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the adapters above."})
    teacher_rank: int = field(default=16, metadata={"help": "Rank of the adapters above."})
    teacher_batch_size: int = field(default=8, metadata={"help": "Texts per step of the adapters above."})
    precompute_targets: bool | None = field(default=None, metadata={"help": "Compute all targets before training."})
    targets_dir: str | None = field(default=None, metadata={"help": "Folder in which targets are kept."})

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
                "at least 0": ("eta", "eta_end", "expert_steps", "novice_steps", "log_tokens", "contrast_rows"),
                "above 0": ("tau", "log_strength", "teacher_learning_rate", "contrast_damping"),
                "at least 1": ("top_k", "contexts_per_sample", "teacher_rank", "teacher_batch_size"),
                "from 0 to 1": ("plausibility", "fact_share", "retain_focus"),
            },
        )
        if self.novice_steps and not self.expert_steps:
            raise ValueError(
                f"`novice_steps` is {self.novice_steps} without an expert adapter: set `expert_steps` too."
            )
        if self.log_tokens and self.tau != 1:
            raise ValueError(
                f"`tau` is {self.tau} with `log_tokens={self.log_tokens}`, which keeps the odds of all other tokens as they "
                "are: set one of the two to its default."
            )
        if self.log_tokens and self.plausibility:
            raise ValueError(
                f"`plausibility` is {self.plausibility} with `log_tokens={self.log_tokens}`, which keeps the odds of all "
                "other tokens and drops none: set one of the two to 0."
            )
        if self.novice == "counterfactual" and self.expert_steps:
            raise ValueError(
                f'`expert_steps` is {self.expert_steps} with `novice="counterfactual"`, whose expert is the reference: set '
                "it to 0."
            )
        if self.expert_steps:
            self.precompute_targets = True


class ElmTrainer(ErasureTrainer):
    """Trainer for Erasure of Language Memory (ELM).

    `Loss = λe·erase + λr·retain + λc·consistency`, each the mean over rows of the mean over their text's positions (0 for a
    row without a synthetic pair; those of the erase term include what follows the text's last token, but for a
    counterfactual novice):
    soft cross-entropy with [`erasure_target`] on forget text (with `log_tokens`: [`log_space_divergence`] and
    [`log_space_loss`] to [`log_space_target`]); KL, argmax cross-entropy or [`log_space_divergence`] to the reference on
    retain text; negative log-likelihood of the completion of synthetic pairs.

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
        counterfactual = args.novice == "counterfactual" and args.erase_weight > 0
        if counterfactual:
            for name, given in named_datasets(train_dataset, eval_dataset):
                _check_novices(name, given)
        model, processing_class = load_given(model, args, processing_class, kwargs.pop("quantization_config", None))
        vocabulary = model.config.get_text_config().vocab_size
        if args.top_k > vocabulary:
            raise ValueError(f"`top_k` is {args.top_k}, but the vocabulary has {vocabulary} tokens: lower it.")
        if data_collator is None:
            data_collator = ElmDataCollator(
                processing_class,
                concepts=None if args.expert_steps or counterfactual else _concepts(args, train_dataset, eval_dataset),
                counterfactual=counterfactual,
                past_end=not counterfactual,
                contexts_per_sample=args.contexts_per_sample,
                pad_to_multiple_of=args.pad_to_multiple_of,
                seed=args.seed,
            )
        elif args.expert_steps and getattr(data_collator, "concepts", None) is not None:
            raise ValueError(
                f"`data_collator` brings contexts, with which the adapters of `expert_steps={args.expert_steps}` would be tuned "
                "and never used: leave its `concepts` out, or set `expert_steps` to 0."
            )
        self._teachers: dict[str, Teacher] = {}
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, processing_class, **kwargs)
        # Whether there is a consistency term, though some batches may have no part in it.
        self._consistent = False
        if args.consistency_weight and self.train_dataset is not None:
            self._consistent = any(map(len, self.train_dataset["synthetic_ids"]))
            if not self._consistent:
                logger.warning(
                    f"`consistency_weight` is {args.consistency_weight}, but no row of the dataset has a synthetic pair (columns "
                    "`prompt` and `completion`), so there is no consistency term: add pairs, or set it to 0."
                )
        if stored := self.precompute(elm_target_plan(self)):
            self.data_collator.targets = stored
        if args.contrast_rows and self.train_dataset is not None:
            contrast_adapter(self, args.contrast_rows, args.contrast_damping)

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
        readings = {term: self._reading(term, batch, targets.get(term)) for term, batch in batches.items()}
        further = {term: [target["states"]] for term, target in targets.items() if "states" in target}
        values = self.forward_positions(model, batches, readings, further)
        if "erase" in values:
            values["erase"] = values["erase"] * targets["erase"]["weights"]
        if "retain" in values and self.args.retain_focus:
            batch, moved = batches["retain"], values["retain"].detach().clamp(min=1e-6)
            weights_of = position_weights(moved, batch["rows"], batch["input_ids"].size(0), self.args.retain_focus)
            values["retain"] = values["retain"] * weights_of
        rows = inputs["forget"]["input_ids"].size(0)
        terms = {term: batch_mean(value, batches[term], rows) for term, value in values.items()}
        if self._consistent and "consistency" not in terms:
            # Logged as it counts: a batch without pairs is one whose rows add nothing.
            terms["consistency"] = torch.zeros((), device=self.args.device)
        loss = self.weigh(terms, weights)
        return (loss, None) if return_outputs else loss

    def _reading(self, term: str, batch: Mapping[str, Any], target: Mapping[str, torch.Tensor] | None) -> Reading:
        """The loss of each position of a term, as a function of its logits."""
        if target is None:
            return nll_reading(batch)
        if term == "retain" and self.args.retain_loss == "log":
            return lambda logits, where, reference: log_space_divergence(logits, reference)
        if term == "erase" and self.args.log_tokens:
            chosen = LogTarget(target["indices"], target["log_probs"])
            return partial(_log_reading, chosen, self.args.log_strength)
        aim = SparseDistribution(target["indices"], target["probs"])
        if term == "erase":
            return lambda logits, where: soft_cross_entropy(logits, aim.part(where))
        if self.args.retain_loss == "kl":
            return lambda logits, where: kl_to_reference(logits, aim.part(where))
        return lambda logits, where: argmax_cross_entropy(logits, aim.indices[where, 0])

    def _target(self, model: nn.Module, term: str, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What the adapted model is to match on a sub-batch, from the reference (and the teachers)."""
        if term == "retain" and self.args.retain_loss == "log":
            return {"states": self.reference_positions(model, {"retain": batch}, {"retain": STATES})["retain"]}
        if term == "retain":
            readings = {"retain": lambda logits, where: top_k_distribution(logits, self.args.top_k)}
            indices, probs = self.reference_positions(model, {"retain": batch}, readings)["retain"]
            return {"indices": indices, "probs": probs}
        eta, tau = self._eta(batch), self.args.tau
        assert tau is not None  # `ElmConfig.__post_init__` has filled what was left out.
        with self.reference(model):
            batches, beside = {"base": batch}, {}
            experts: list[torch.Tensor] = []
            novices: list[torch.Tensor] = []
            if counterfactual := batch.get("counterfactual"):
                beside["base"] = counterfactual["index"]
                batches |= {"extra": counterfactual["extra"]} if "extra" in counterfactual else {}
            else:
                experts, novices = (self._states(model, side, batch) for side in ("expert", "novice"))

            def read(base: torch.Tensor, where: slice, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
                if counterfactual:
                    expert, novice = base, log_mean_probs(others)
                else:
                    # Without a novice of its own, the reference is the novice.
                    expert = mean_log_probs(others[: len(experts)])
                    novice = mean_log_probs(others[len(experts) :] or (base,))
                apart = disagreement(expert, novice)
                if tokens := self.args.log_tokens:
                    return (*log_space_target(base, expert, novice, eta=eta[where], tokens=tokens), apart)
                target = erasure_target(
                    base, expert, novice, eta=eta[where], temperature=tau, top_k=self.args.top_k,
                    plausibility=self.args.plausibility,
                )  # fmt: skip
                return (*target, apart)

            asked: dict[str, Reading] = {"base": read} | ({"extra": STATES} if "extra" in batches else {})
            kept = ("base",) if self.args.log_tokens else ()
            further = {"base": [*experts, *novices]}
            found = self.forward_positions(model, batches, asked, further, beside, kept)["base"]
        indices, values, apart, *states = found
        weights = position_weights(apart, batch["rows"], batch["input_ids"].size(0), self.args.fact_share)
        if self.args.log_tokens:
            return {"indices": indices, "log_probs": values, "weights": weights, "states": states[0]}
        return {"indices": indices, "probs": values, "weights": weights}

    def _eta(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """η of each position of the forget text, `[positions]`: that of the token which predicts the next, as released."""
        assert self.args.eta is not None and self.args.eta_end is not None
        mask = batch["attention_mask"]
        position = (mask.cumsum(-1) - 1)[batch["rows"], batch["columns"]]
        return ramped_eta(position, mask.sum(-1)[batch["rows"]], self.args.eta, self.args.eta_end)

    def _states(self, model: nn.Module, side: str, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """States of expert or novice at the positions of the forget text, `[positions, hidden]` for each context or the
        teacher; none where the reference is the novice.
        """
        if side not in batch:
            if side not in self._teachers:
                return []
            with self._teachers[side].in_place():
                return [self.forward_positions(model, {side: batch}, {side: STATES})[side]]
        states = self.forward_positions(model, {side: batch[side]}, {side: STATES})[side]
        contexts = self.args.contexts_per_sample
        # Rows of the contexts follow each other text by text: text 0 context 0, text 0 context 1, ...
        rows = batch["rows"]
        counts = torch.bincount(rows, minlength=batch["input_ids"].size(0))
        starts = (counts.cumsum(0) - counts)[rows]
        first = (contexts - 1) * starts + torch.arange(len(rows), device=rows.device)
        return [states[first + context * counts[rows]] for context in range(contexts)]


def _log_reading(
    chosen: LogTarget, weight: float, logits: torch.Tensor, where: slice, reference: torch.Tensor
) -> torch.Tensor:
    with torch.no_grad():
        target = chosen.part(where).over(reference)
    return log_space_divergence(logits, target) + weight * log_space_loss(logits, chosen.part(where))


def _check_novices(name: str, dataset: Any) -> None:
    """Raise `ValueError` unless every row has counterfactual novices, and all as many."""
    if "aligned" in dataset.column_names:
        return
    counts = {len(novices) for novices in dataset["novices"]} if "novices" in dataset.column_names else {0}
    if counts != {max(counts)} or counts == {0}:
        raise ValueError(
            f'`{name}` has rows with {sorted(counts)} `novices`, but `novice="counterfactual"` needs as many for every '
            "forget text: make them with `counterfactuals`, or use the contexts."
        )


def _concepts(args: ElmConfig, train_dataset: Any, eval_dataset: Any) -> dict[str, Concept]:
    """The concept of each name that stands in a dataset."""
    described: dict[str, str] = {}
    for name, dataset in named_datasets(train_dataset, eval_dataset):
        check_columns(name, dataset)
        if "concept" in dataset.column_names:
            described |= dict.fromkeys(set(dataset.unique("concept")) - set(described), "")
        if "keywords" in dataset.column_names:
            described |= {c: words for c, words in zip(dataset["concept"], dataset["keywords"], strict=True) if words}
    names = set(described)
    given: list[str | Concept] = [*(args.concepts or ())]
    given = given or [Concept(name, [words]) if words else name for name, words in sorted(described.items())]
    concepts = {concept.name: concept for concept in map(load_concept, given)}
    if missing := names - set(concepts):
        raise ValueError(f"`concepts` is {args.concepts}, but the dataset also names {sorted(missing)}: add them.")
    return concepts
