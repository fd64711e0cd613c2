"""Erasure of Language Memory (arXiv 2410.02760): the trainer. Its equations are in docs/papers.md."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.utils import logging

from ..concept import Concept, load_concept
from ..data.collator import ElmDataCollator
from ..modeling import decoder_layers, reentrant
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
from .base import ErasureTrainer
from .contrast import contrast_adapter
from .elm_config import ElmConfig, stored_targets
from .forward import SUB_BATCHES, batch_mean, nll_reading, weighted_batches
from .novice_states import (
    check_novices,
    chosen_state_layers,
    layer_outputs,
    measure_scale,
    novice_mean,
    state_losses,
    states_of,
)
from .targets import TargetPlan, Teacher, precompute_targets


logger = logging.get_logger(__name__)


class ElmTrainer(ErasureTrainer):
    """Trainer for Erasure of Language Memory (ELM).

    `Loss = λe·erase + λs·state + λr·retain + λc·consistency`, each the mean over rows of the mean over their text's positions (0 for a
    row without a synthetic pair; those of the erase term include what follows the text's last token, but for a
    counterfactual novice):
    soft cross-entropy with [`erasure_target`] on forget text (with `log_tokens`: [`log_space_divergence`] and
    [`log_space_loss`] to [`log_space_target`]), or [`state_loss`] to a counterfactual novice's states; KL, argmax cross-entropy,
    [`log_space_divergence`] or [`state_loss`] to the reference on retain text; negative log-likelihood of the completion of
    synthetic pairs.

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

    def set_up(self):
        args = self.args
        # Adapters that stand for expert and novice while targets are computed.
        self._teachers: dict[str, Teacher] = {}
        # Whether there is a consistency term, though some batches may have no part in it.
        self._consistent = False
        if args.consistency_weight and self.train_dataset is not None:
            self._consistent = any(map(len, self.train_dataset["synthetic_ids"]))
            if not self._consistent:
                logger.warning(
                    f"`consistency_weight` is {args.consistency_weight}, but no row of the dataset has a synthetic pair (columns "
                    "`prompt` and `completion`), so there is no consistency term: add pairs, or set it to 0."
                )
        # Layers of the state term, and its scale, `[layers, hidden]`.
        self._state_layers: list[int] = []
        if args.state_weight:
            depth = len(decoder_layers(self.accelerator.unwrap_model(self.model)))
            self._state_layers = chosen_state_layers(args.state_layers, depth)
            if self.train_dataset is not None:
                self._state_scale = measure_scale(self, self._state_layers)
        if stored := precompute_targets(self, self.target_plan()):
            self.data_collator.targets = stored
        if args.contrast_rows and self.train_dataset is not None:
            contrast_adapter(
                self,
                args.contrast_rows,
                args.contrast_damping,
                lambda batch: (batch.get("target") or self.target(self.model, "erase", batch))["weights"],
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args = self.args
        weights = {
            "erase": args.erase_weight,
            "state": args.state_weight,
            "retain": args.retain_weight,
            "consistency": args.consistency_weight,
        }
        batches = weighted_batches(inputs, _by_batch(weights))
        targets = {
            term: batches[term].get("target") or self.target(model, term, batches[term])
            for term in ("erase", "retain")
            if term in batches
        }
        readings = {term: self._position_loss(term, batch, targets.get(term)) for term, batch in batches.items()}
        further = {term: [target["states"]] for term, target in targets.items() if "states" in target}
        with layer_outputs(self, model, self._state_layers) as outputs:
            losses = self.forward_positions(model, batches, readings, further)  # [positions] each
        if self._state_layers:
            losses["state"] = state_losses(self, model, batches, "erase", outputs, targets["erase"]["novice_states"])
        if "retain" in batches and args.retain_loss == "states":
            losses["retain"] = state_losses(self, model, batches, "retain", outputs, targets["retain"]["layer_states"])
        if not args.erase_weight:
            losses.pop("erase", None)
        for term in {"erase", "state"} & losses.keys():
            losses[term] = losses[term] * targets["erase"]["weights"]
        if "retain" in losses and args.retain_focus:
            moved = losses["retain"].detach().clamp(min=1e-6)
            losses["retain"] = losses["retain"] * _weights(moved, batches["retain"], args.retain_focus)
        rows = inputs["forget"]["input_ids"].size(0)
        batches["state"] = batches.get("erase")
        terms = {term: batch_mean(values, batches[term], rows) for term, values in losses.items()}
        if self._consistent and "consistency" not in terms:
            # Logged as it counts: a batch without pairs is one whose rows add nothing.
            terms["consistency"] = torch.zeros((), device=args.device)
        loss = self.weigh(terms, weights)
        return (loss, None) if return_outputs else loss

    def _position_loss(
        self, term: str, batch: Mapping[str, Any], target: Mapping[str, torch.Tensor] | None
    ) -> Reading:
        """The loss of each position of a term, as a function of its logits."""
        if target is None:
            return nll_reading(batch)
        if term == "erase" and not self.args.erase_weight:
            return STATES  # no logits are read where the state term stands alone
        if term == "retain" and self.args.retain_loss == "states":
            return STATES
        if term == "retain" and self.args.retain_loss == "log":
            return lambda logits, where, reference: log_space_divergence(logits, reference)
        if term == "erase" and self.args.log_tokens:
            chosen = LogTarget(target["indices"], target["log_probs"])

            def in_log_space(logits: torch.Tensor, where: slice, reference: torch.Tensor) -> torch.Tensor:
                part = chosen.part(where)
                with torch.no_grad():
                    whole = part.over(reference)
                return log_space_divergence(logits, whole) + self.args.log_strength * log_space_loss(logits, part)

            return in_log_space
        aim = SparseDistribution(target["indices"], target["probs"])
        if term == "erase":
            return lambda logits, where: soft_cross_entropy(logits, aim.part(where))
        if self.args.retain_loss == "kl":
            return lambda logits, where: kl_to_reference(logits, aim.part(where))
        return lambda logits, where: argmax_cross_entropy(logits, aim.indices[where, 0])

    def target(self, model: nn.Module, term: str, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """What the adapted model is to match on a sub-batch.

        Args:
            model (`nn.Module`): Model, as the Trainer wrapped it.
            term (`str`): `"erase"` or `"retain"`.
            batch (`Mapping`): Its sub-batch.

        Returns:
            `dict[str, torch.Tensor]`: for each position, `indices` with `probs` or `log_probs`, `[positions, tokens]`,
            what enters the reference's head, `states`, `[positions, hidden]`, or what its layers give, `layer_states`,
            `[positions, layers·hidden]`; of the erase term also `weights`, and for the state term `novice_states`,
            `[positions, layers·hidden]`.
        """
        if term == "erase":
            return self._erase_target(model, batch)
        if self.args.retain_loss == "states":
            with layer_outputs(self, model, self._state_layers) as outputs:
                self.reference_positions(model, {term: batch}, {term: STATES})
            return {"layer_states": states_of(self, model, {term: batch}, term, outputs).flatten(1)}
        if self.args.retain_loss == "log":
            return {"states": self.reference_positions(model, {term: batch}, {term: STATES})[term]}
        readings = {term: lambda logits, where: top_k_distribution(logits, self.args.top_k)}
        indices, probs = self.reference_positions(model, {term: batch}, readings)[term]
        return {"indices": indices, "probs": probs}

    def _erase_target(self, model: nn.Module, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """`t = b − η·(e − n)` of the reference (and the teachers), see [`erasure_target`] and [`log_space_target`]."""
        args, eta, counterfactual = self.args, self._eta(batch), batch.get("counterfactual")

        def read(
            base: torch.Tensor,
            where: slice,
            *counterfactuals: torch.Tensor,
            experts: Sequence[torch.Tensor] = (),
            novices: Sequence[torch.Tensor] = (),
        ) -> tuple[torch.Tensor, ...]:
            if counterfactuals:
                expert, novice = base, log_mean_probs(counterfactuals)
            else:
                # Without a novice of its own, the reference is the novice.
                expert, novice = mean_log_probs(experts), mean_log_probs(novices or [base])
            apart = disagreement(expert, novice)
            if not args.erase_weight:
                return (apart,)
            if args.log_tokens:
                return (apart, *log_space_target(base, expert, novice, eta=eta[where], tokens=args.log_tokens))
            assert args.tau is not None  # `ElmConfig.__post_init__` has filled what was left out.
            target = erasure_target(
                base, expert, novice, eta=eta[where], temperature=args.tau, top_k=args.top_k,
                plausibility=args.plausibility,
            )  # fmt: skip
            return (apart, *target)

        batches, readings = {"base": batch}, dict[str, Reading](base=read)
        states = ("base",) if args.log_tokens and args.erase_weight else ()
        outputs: list[torch.Tensor] = []
        with self.reference(model):
            if counterfactual:
                if "extra" in counterfactual:
                    batches["extra"], readings["extra"] = counterfactual["extra"], STATES
                beside = {"base": counterfactual["index"]}
                with layer_outputs(self, model, self._state_layers) as outputs:
                    found = self.forward_positions(model, batches, readings, beside=beside, states=states)["base"]
            else:
                others = {f"{side}s": self._states(model, side, batch) for side in ("expert", "novice")}
                found = self.forward_positions(model, batches, readings, {"base": others}, states=states)["base"]
        target = dict(
            zip(("apart", "indices", "log_probs" if args.log_tokens else "probs", "states"), found, strict=False)
        )
        target["weights"] = _weights(target.pop("apart"), batch, args.fact_share)
        if counterfactual and outputs:
            slots = self.pack(model, list(batches.values())).slots
            novice = novice_mean(outputs, slots, counterfactual["index"])
            expert = states_of(self, model, batches, "base", outputs).float()
            target["novice_states"] = torch.lerp(expert, novice, args.state_eta).flatten(1)
        return target

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

    def target_plan(self) -> TargetPlan:
        """What is computed once for all training rows: the targets of both terms."""
        args, config = self.args, self.model.config.get_text_config()
        layout, settings, columns = stored_targets(args, config.vocab_size, config.hidden_size, self._state_layers)

        def compute(inputs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
            parts: list[dict[str, torch.Tensor]] = [{} for _ in inputs["forget"]["lengths"]]
            weights = {"erase": args.erase_weight, "state": args.state_weight, "retain": args.retain_weight}
            batches = weighted_batches(inputs, _by_batch(weights))
            for term, batch in batches.items():
                counts = torch.bincount(batch["rows"], minlength=len(parts)).tolist()
                for key, values in self.target(self.model, term, batch).items():
                    name = f"{SUB_BATCHES[term]}_{key}"
                    if name not in layout.fields:
                        continue
                    if values.dim() == 2:
                        values = values[:, : layout.fields[name].width]
                    for part, piece in zip(parts, values.cpu().split(counts), strict=True):
                        part[name] = piece
            return parts

        return TargetPlan(
            switch="precompute_targets",
            layout=layout,
            settings=settings,
            columns=columns,
            targets_dir=args.targets_dir,
            compute=compute,
            contexts=bool(args.erase_weight) and args.novice == "contexts",
            prepare=self._tuned_teachers,
        )

    @contextmanager
    def _tuned_teachers(self) -> Iterator[None]:
        """The throw-away adapters, tuned on entry and gone on exit."""
        args = self.args
        sides = (("expert", args.expert_steps, "forget_ids"), ("novice", args.novice_steps, "novice_ids"))
        try:
            for side, steps, column in sides:
                if steps and args.erase_weight:
                    self._teachers[side] = Teacher.fit(self, side, list(self.train_dataset[column]), steps)
            yield
        finally:
            for teacher in self._teachers.values():
                teacher.remove()
            self._teachers.clear()

    def default_collator(self, args, processing_class, datasets):
        counterfactual = _is_counterfactual(args)
        return ElmDataCollator(
            processing_class,
            concepts=None if args.expert_steps or counterfactual else _concepts(args, datasets),
            counterfactual=counterfactual,
            past_end=not counterfactual,
            faithful=args.faithful,
            contexts_per_sample=args.contexts_per_sample,
            pad_to_multiple_of=args.pad_to_multiple_of,
            seed=args.seed,
        )

    def check_given(self, model, args, datasets, data_collator):
        if args.expert_steps and any(name.startswith("eval_dataset") for name in datasets):
            raise ValueError(
                f"`eval_dataset` is given with `expert_steps={args.expert_steps}`, whose adapters are gone when training "
                "starts, so that only training rows have targets: leave one of the two out."
            )
        if args.expert_steps and getattr(data_collator, "concepts", None) is not None:
            raise ValueError(
                f"`data_collator` brings contexts, with which the adapters of `expert_steps={args.expert_steps}` would be tuned "
                "and never used: leave its `concepts` out, or set `expert_steps` to 0."
            )
        if _is_counterfactual(args):
            check_novices(datasets)
        if args.state_weight:
            if reentrant(args):
                raise ValueError(
                    "`gradient_checkpointing_kwargs` has `use_reentrant=True` (DeepSpeed ZeRO-3 forces it), through which no "
                    "gradient reaches what layers give: set it to False, `gradient_checkpointing=False`, or `state_weight=0`."
                )
            chosen_state_layers(args.state_layers, len(decoder_layers(model)))
        vocabulary = model.config.get_text_config().vocab_size
        if args.top_k > vocabulary:
            raise ValueError(f"`top_k` is {args.top_k}, but the vocabulary has {vocabulary} tokens: lower it.")


def _by_batch(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights by sub-batch: the state term reads that of the erase term."""
    return {"erase": max(weights["erase"], weights["state"])} | {
        term: weight for term, weight in weights.items() if term not in ("erase", "state")
    }


def _weights(values: torch.Tensor, batch: Mapping[str, Any], share: float) -> torch.Tensor:
    return position_weights(values, batch["rows"], batch["input_ids"].size(0), share)


def _is_counterfactual(args: ElmConfig) -> bool:
    return args.novice == "counterfactual" and max(args.erase_weight, args.state_weight) > 0


def _concepts(args: ElmConfig, datasets: Mapping[str, Dataset]) -> dict[str, Concept]:
    """The concept of each name that stands in a dataset."""
    described: dict[str, str] = {}
    for dataset in datasets.values():
        if "concept" in dataset.column_names:
            described |= dict.fromkeys(set(dataset.unique("concept")) - set(described), "")
        if "keywords" in dataset.column_names:
            described |= {c: words for c, words in zip(dataset["concept"], dataset["keywords"], strict=True) if words}
    given: list[str | Concept] = [*(args.concepts or ())]
    given = given or [Concept(name, [words]) if words else name for name, words in sorted(described.items())]
    concepts = {concept.name: concept for concept in map(load_concept, given)}
    if missing := set(described) - set(concepts):
        raise ValueError(f"`concepts` is {args.concepts}, but the dataset also names {sorted(missing)}: add them.")
    return concepts
